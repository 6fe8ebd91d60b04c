"""POST /v1/embeddings in OpenAI's shape."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from fastapi import APIRouter, Response
from starlette.concurrency import run_in_threadpool

from models.errors import InvalidInput
from models.knowledge.names import normalize_class_name, validate_class_names
from service.core import repositories
from service.core.errors import Conflict, Invalid, NotFound, Problem
from service.deps import Parts, PartsDep
from service.json import FastJSON, vector_out
from service.problems import documented
from service.routes.embedding_sets import require_ready
from service.schemas import EmbeddingsOut, EmbeddingsRequest

router = APIRouter(prefix="/v1/embeddings", tags=["embedding sets"])
MAX_INPUTS = 2048  # as OpenAI's


@router.post("", response_model=EmbeddingsOut, responses=documented(NotFound, Conflict))
async def embeddings(body: EmbeddingsRequest, parts: PartsDep) -> Response:
    """OpenAI's shape: seen and stored classes answer their vectors, any other class name is predicted on the fly."""
    names = _names(body.input)
    set_id, dim, vectors = await run_in_threadpool(_stored_vectors, parts, body.model, names)
    if body.dimensions is not None and body.dimensions > dim:
        message = f"`dimensions` is {body.dimensions}; this set has {dim}. Ask for at most as many."
        raise Invalid(message, problems=[Problem("/dimensions", message)])
    new = {normalize_class_name(name): name for name in reversed(names) if normalize_class_name(name) not in vectors}
    if new:
        for entry in (await parts.inference.relate(set_id, list(new.values()), field="input"))["classes"]:
            vectors[normalize_class_name(entry["name"])] = base64.b64decode(entry["vector"])
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


def _names(given: str | list[str]) -> list[str]:
    """The class names asked for; unlike elsewhere, the same one may come twice."""
    names = [given] if isinstance(given, str) else given
    if not 1 <= len(names) <= MAX_INPUTS:
        message = f"`input` holds {len(names):,} names; send 1 to {MAX_INPUTS:,}."
        raise Invalid(message, problems=[Problem("/input", message)])
    for index, name in enumerate(names):
        try:
            validate_class_names([name], field="input")
        except InvalidInput as error:
            message = str(error).replace("input/0", f"input/{index}")
            raise InvalidInput(message, field=f"input/{index}" if isinstance(given, list) else "input") from None
    return names


def _stored_vectors(parts: Parts, model: str, names: Sequence[str]) -> tuple[str, int, dict[str, bytes]]:
    """Id and dimension of the set, and normalised name -> vector of the names it holds, however they are spelled."""
    with parts.database.read() as session:
        row = require_ready(session, repositories.find_embedding_set(session, model))
        rows = repositories.classes_of(session, row.id, names=list(dict.fromkeys(names)))
        if len(rows) < len(set(names)):
            keys = set(map(normalize_class_name, names)) - {normalize_class_name(c.name) for c in rows}
            others = [n for n, _ in repositories.class_names_of(session, row.id) if normalize_class_name(n) in keys]
            rows += repositories.classes_of(session, row.id, names=others)
        return row.id, row.dim or 0, {normalize_class_name(c.name): c.vector for c in rows}


def _leading(raw: bytes, dimensions: int | None) -> bytes:
    """The first `dimensions` numbers, scaled to unit length again, as OpenAI's API does."""
    if dimensions is None:
        return raw
    vector = np.frombuffer(raw, dtype="<f4")[:dimensions]
    norm = float(np.linalg.norm(vector))
    return (vector / norm if norm > 0 else vector).astype("<f4").tobytes()
