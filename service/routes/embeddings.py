"""POST /v1/embeddings in OpenAI's shape."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from fastapi import APIRouter, Response
from starlette.concurrency import run_in_threadpool

from models.knowledge.names import normalize_class_name, validate_class_names
from service.core import repositories
from service.core.errors import Conflict, Invalid, NotFound, Problem
from service.deps import Parts, PartsDep
from service.json import FastJSON, vector_out
from service.problems import documented
from service.routes.embedding_sets import require_ready
from service.schemas import EmbeddingsRequest

router = APIRouter(prefix="/v1/embeddings", tags=["embedding sets"])
MAX_INPUTS = 2048  # as OpenAI's


@router.post("", responses=documented(NotFound, Conflict))
async def embeddings(body: EmbeddingsRequest, parts: PartsDep) -> Response:
    """OpenAI's shape: seen and stored classes answer their vectors, any other class name is predicted on the fly."""
    names = [body.input] if isinstance(body.input, str) else body.input
    if not 1 <= len(names) <= MAX_INPUTS:
        raise Invalid(
            f"`input` holds {len(names)} names; 1 to 2048 are taken.", problems=[Problem("/input", "1 to 2048 names")]
        )
    for name in dict.fromkeys(names):
        validate_class_names([name], field="input")
    set_id, dim, vectors = await run_in_threadpool(_stored_vectors, parts, body.model, names)
    new = list(dict.fromkeys(name for name in names if normalize_class_name(name) not in vectors))
    if new:
        for entry in (await parts.inference.relate(set_id, new))["classes"]:
            vectors[normalize_class_name(entry["name"])] = base64.b64decode(entry["vector"])
    if body.dimensions is not None and body.dimensions > dim:
        raise Invalid(
            f"`dimensions` is {body.dimensions}; this set has {dim}.",
            problems=[Problem("/dimensions", f"at most {dim}")],
        )
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": vector_out(
                _leading(vectors[normalize_class_name(name)], body.dimensions), body.encoding_format
            ),
        }
        for index, name in enumerate(names)
    ]
    tokens = sum(len(name.split()) for name in names)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return FastJSON({"object": "list", "data": data, "model": body.model, "usage": usage})


def _stored_vectors(parts: Parts, model: str, names: Sequence[str]) -> tuple[str, int, dict[str, bytes]]:
    with parts.database.read() as session:
        row = require_ready(session, repositories.find_embedding_set(session, model))
        spelled = {normalize_class_name(name): name for name, _ in repositories.class_names_of(session, row.id)}
        wanted = {normalize_class_name(name) for name in names} & set(spelled)
        rows = repositories.classes_of(session, row.id, names=[spelled[key] for key in wanted])
        return row.id, row.dim or 0, {normalize_class_name(c.name): c.vector for c in rows}


def _leading(raw: bytes, dimensions: int | None) -> bytes:
    """The first `dimensions` numbers, scaled to unit length again, as OpenAI's API does."""
    if dimensions is None:
        return raw
    vector = np.frombuffer(raw, dtype="<f4")[:dimensions]
    norm = float(np.linalg.norm(vector))
    return (vector / norm if norm > 0 else vector).astype("<f4").tobytes()


def _invalid(pointer: str, message: str) -> Invalid:
    return Invalid(message, problems=[Problem(pointer, message)])
