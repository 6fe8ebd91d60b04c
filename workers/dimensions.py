"""What the dimensions of class embeddings are called, and a vector of each for methods that start from such."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.base import FloatArray
from models.catalog import get_method
from models.embedding.storage import HEADS_FILE, MANIFEST_FILE, load_heads
from models.errors import InvalidInput
from models.knowledge.tables import ClassTable
from service.core import repositories
from service.core.tables import EmbeddingSet, Knowledge
from workers.runner import TaskContext
from workers.sources import open_knowledge, unpack
from workers.training_inputs import Inputs

MAX_TOLD = 10


@dataclass(frozen=True)
class Dimensions:
    """names: what they are called, if anybody said so. vectors (n_dims, width): where a method's v_n start, or None."""

    names: tuple[str, ...] | None
    vectors: FloatArray | None
    warnings: tuple[str, ...] = ()


def read_dimensions(context: TaskContext, inputs: Inputs, n_dims: int) -> Dimensions:
    """The request's names, else those of a knowledge source whose vectors are used as they are; vectors by name.

    Where the request names no source of vectors, those that came with the attributes' table serve, and for an embedding
    set of VGSE's clusters alone what these answer to in features. Names without a vector get a random one: it is
    learned in any case. InvalidInput where no name is known, or the number is wrong.
    """
    row = inputs.row
    names: tuple[str, ...] | None = None
    own: FloatArray | None = None
    if row.embedding_set_id is None and inputs.knowledge.kind == "attributes":
        table = open_knowledge(inputs.knowledge, context.store, context.settings)
        if isinstance(table, ClassTable):
            names, own = table.attribute_names, table.attribute_vectors
    if (asked := row.request.get("dimension_names")) is not None:
        names, own = tuple(asked), None
    if names is not None and len(names) != n_dims:
        raise InvalidInput(
            f"{len(names)} names were given, and class embeddings have {n_dims} dimensions.", field="dimension_names"
        )
    source = row.request.get("dimension_knowledge_id")
    if not get_method(row.method, "classifier").takes_dimension_vectors:
        return Dimensions(names, None)
    if source is None:
        return Dimensions(names, own if own is not None else _of_clusters(context, inputs.embedding_set, n_dims))
    if names is None:
        raise InvalidInput("Nothing says what the dimensions are called: give their names.", field="dimension_names")
    return _looked_up(context, source, names, row.request["seed"])


def _of_clusters(context: TaskContext, embedding_set: EmbeddingSet | None, n_dims: int) -> FloatArray | None:
    """Directions of VGSE's clusters, (n_dims, D); none where embeddings hold other numbers beside them."""
    if embedding_set is None or HEADS_FILE not in embedding_set.artifacts:
        return None
    files = (HEADS_FILE, MANIFEST_FILE)
    directory = unpack(context.store, embedding_set.artifacts, files, context.scratch_dir / "clusters")
    found: FloatArray = load_heads(directory)[0].directions().numpy()
    return found if len(found) == n_dims else None


def _looked_up(context: TaskContext, source: str, names: tuple[str, ...], seed: int) -> Dimensions:
    with context.database.read() as session:
        words = repositories.get(session, Knowledge, source)
    found = open_knowledge(words, context.store, context.settings).lookup(names)
    known = np.array([resolution.found for resolution in found.resolutions])
    if not known.any():
        raise InvalidInput(
            f"Knowledge {source!r} has no vector for any of the {len(names)} dimensions, such as {names[0]!r}. "
            "Name another source, or leave it out.",
            field="dimension_knowledge_id",
        )
    random = np.random.default_rng(seed).standard_normal(found.vectors.shape).astype(np.float32)
    vectors = np.where(known[:, None], found.vectors, random)
    missing = [name for name, is_known in zip(names, known, strict=True) if not is_known]
    told = (
        f"{len(missing)} of {len(names)} dimensions have no vector in knowledge {source!r} and start at random ones: "
        f"{', '.join(missing[:MAX_TOLD])}{', …' if len(missing) > MAX_TOLD else ''}.",
    )
    return Dimensions(names, vectors, told if missing else ())
