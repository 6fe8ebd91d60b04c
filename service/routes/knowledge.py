"""Knowledge: word-vector files, tables, inline vectors, text encoders; and how names resolve in them."""

from __future__ import annotations

import math
from typing import Annotated, Any, get_args

from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from models.errors import InvalidInput
from models.knowledge.names import validate_class_names
from service.core import jobs, repositories
from service.core.errors import Conflict, Invalid, NotFound, Problem, TooLarge, UnsupportedMedia
from service.core.ids import new_id
from service.core.tables import Job, Knowledge
from service.deps import Cursor, Limit, Parts, PartsDep, decode_cursor, page_out
from service.json import FastJSON, dumps
from service.problems import documented, pointer_of
from service.schemas import JobOut, KnowledgeCreate, KnowledgeKind, KnowledgeOut, LookupOut, Page
from service.submit import JOB_HEADERS, submit
from service.uploads import file_fields, multipart, scratch_copy, text_field

router = APIRouter(prefix="/v1/knowledge", tags=["knowledge"])
SUFFIXES = (".txt", ".vec", ".bin", ".npz", ".mat", ".csv", ".tsv", ".gz")


def knowledge_out(row: Knowledge) -> dict[str, Any]:
    """A knowledge source as the contract shows it."""
    return {
        "id": row.id,
        "name": row.name,
        "kind": row.kind,
        "status": row.status,
        "dim": row.dim,
        "n_entries": row.n_entries,
        "summary": row.summary,
        "job_id": row.job_id,
        "created_at": row.created_at,
    }


@router.post(
    "",
    status_code=202,
    response_model=JobOut,
    responses={202: {"headers": JOB_HEADERS}, **documented(TooLarge, UnsupportedMedia)},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": KnowledgeCreate.model_json_schema()},
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["name", "kind", "file"],
                        "properties": {
                            "name": {"type": "string"},
                            "kind": {"type": "string", "enum": ["word_vectors", "class_vectors", "attributes"]},
                            "file": {"type": "string", "format": "binary"},
                        },
                    }
                },
            },
        }
    },
)
async def create_knowledge(request: Request, parts: PartsDep) -> Response:
    """Adds a knowledge source; a job reads and indexes it; the job's `resource` names the source."""
    content_type = request.headers.get("content-type", "").split(";")[0].strip()
    if content_type == "multipart/form-data":
        return await _from_file(request, parts)
    if content_type == "application/json":
        return await run_in_threadpool(_from_json, await request.body(), parts)
    raise UnsupportedMedia(f"Send a file as multipart/form-data, or vectors as application/json, not {content_type!r}.")


async def _from_file(request: Request, parts: Parts) -> Response:
    async with multipart(request, parts.settings) as form:
        name = _name(text_field(form, "name"))
        kind = text_field(form, "kind", "word_vectors")
        if kind not in get_args(KnowledgeKind) or kind == "text_encoder":
            raise Invalid(f"A file's 'kind' is word_vectors, class_vectors or attributes, not {kind!r}.")
        files = file_fields(form, "file", "files")
        if len(files) != 1:
            raise Invalid(f"Send exactly one file in the field 'file' ({len(files)} found).")
        filename = (files[0].filename or "").rsplit("/", 1)[-1][-200:]
        if not filename.lower().endswith(SUFFIXES):
            raise UnsupportedMedia(f"{filename!r} has none of the suffixes that are read: {', '.join(SUFFIXES)}.")
        async with scratch_copy(files[0], parts.settings) as path:
            key = await run_in_threadpool(parts.store.put_file, path)
    payload = {"file": key, "filename": filename}
    return await run_in_threadpool(_create, parts, name, kind, payload)


def _from_json(raw: bytes, parts: Parts) -> Response:
    try:
        body = KnowledgeCreate.model_validate_json(raw)
    except ValidationError as error:
        problems = [Problem(pointer_of(tuple(e["loc"])), e["msg"]) for e in error.errors()[:100]]
        first = problems[0]
        raise Invalid(
            f"{len(problems)} problem(s); the first, at {first.pointer or '/'}: {first.message}", problems=problems
        ) from None
    if body.kind == "text_encoder":
        if not body.model or body.vectors is not None:
            raise InvalidInput(
                "kind=text_encoder takes 'model' (a sentence-transformers name) and no 'vectors'.", field="model"
            )
        return _create(parts, body.name, body.kind, {"model": body.model, "template": body.template})
    if not body.vectors:
        raise InvalidInput("'vectors' is missing: give class name -> vector, or upload a file.", field="vectors")
    _check_vectors(body.vectors, parts)
    if body.attribute_names is not None and len(body.attribute_names) != len(next(iter(body.vectors.values()))):
        raise InvalidInput("'attribute_names' must name every dimension of the vectors.", field="attribute_names")
    table = {"vectors": body.vectors, "attribute_names": body.attribute_names}
    return _create(
        parts, body.name, body.kind, {"file": parts.store.put_bytes(dumps(table)), "filename": "inline.json"}
    )


def _check_vectors(vectors: dict[str, list[float]], parts: Parts) -> None:
    validate_class_names(list(vectors), max_count=parts.settings.max_classes, field="vectors")
    first_name, first = next(iter(vectors.items()))
    for name, vector in vectors.items():
        if len(vector) != len(first):
            raise InvalidInput(
                f"{name!r} has {len(vector)} numbers, {first_name!r} has {len(first)}; all vectors need one length.",
                field=f"vectors/{name}",
            )
        if not all(map(math.isfinite, vector)):
            raise InvalidInput(f"The vector of {name!r} holds NaN or infinity.", field=f"vectors/{name}")
        if not any(vector):
            raise InvalidInput(f"The vector of {name!r} is all zeros.", field=f"vectors/{name}")
    if len(first) > parts.settings.max_vector_dim:
        raise TooLarge(f"Vectors have {len(first):,} dimensions; at most {parts.settings.max_vector_dim:,} are taken.")


def _name(text: str) -> str:
    if not text.strip() or len(text) > 200 or any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise Invalid("'name' must have 1 to 200 printable characters.")
    return text


def _create(parts: Parts, name: str, kind: str, payload: dict[str, Any]) -> Response:
    with parts.database.write() as session:
        row = Knowledge(id=new_id("knowledge"), name=name, kind=kind)
        session.add(row)
        job = jobs.create_job(session, "index_knowledge", row.id, payload, parts.settings.max_attempts)
        row.job_id = job.id
    return submit(parts, job)


@router.get("", response_model=Page[KnowledgeOut])
def list_knowledge(parts: PartsDep, limit: Limit = 20, cursor: Cursor = None) -> Response:
    """Knowledge sources, newest first."""
    with parts.database.read() as session:
        rows, more = repositories.page(session, Knowledge, limit=limit, cursor=decode_cursor(cursor))
    return FastJSON(page_out([knowledge_out(row) for row in rows], more, lambda: rows[-1].id))


@router.get("/{knowledge_id}", response_model=KnowledgeOut, responses=documented(NotFound))
def get_knowledge(knowledge_id: str, parts: PartsDep) -> Response:
    """One knowledge source."""
    with parts.database.read() as session:
        return FastJSON(knowledge_out(repositories.get(session, Knowledge, knowledge_id)))


@router.delete("/{knowledge_id}", status_code=204, responses=documented(NotFound, Conflict))
def delete_knowledge(knowledge_id: str, parts: PartsDep) -> Response:
    """Deletes a source that nothing uses."""
    with parts.database.write() as session:
        repositories.delete_knowledge(session, knowledge_id)
    return Response(status_code=204)


@router.get("/{knowledge_id}/lookup", response_model=LookupOut, responses=documented(NotFound, Conflict))
async def lookup(
    knowledge_id: str,
    parts: PartsDep,
    names: Annotated[list[str], Query(min_length=1, max_length=1000, description="Repeat, or separate by commas.")],
) -> Response:
    """Which class names resolve, and how; near entries for those that do not."""
    wanted = [name.strip() for part in names for name in part.split(",")]
    validate_class_names(wanted, field="names")
    await run_in_threadpool(ready_knowledge, parts, knowledge_id)
    found = (await parts.inference.lookup(knowledge_id, wanted))["resolutions"]
    n_found = sum(entry["found"] for entry in found)
    return FastJSON(
        {"knowledge_id": knowledge_id, "n_found": n_found, "n_missing": len(found) - n_found, "data": found}
    )


def ready_knowledge(parts: Parts, knowledge_id: str) -> Knowledge:
    """The source, which must be ready; Conflict says what to wait for."""
    with parts.database.read() as session:
        row = repositories.get(session, Knowledge, knowledge_id)
        if row.status == "ready":
            return row
        job = session.get(Job, row.job_id) if row.job_id else None
    if row.status == "importing":
        raise Conflict(f"Knowledge {knowledge_id!r} is still being read; wait for job {row.job_id}.", retry_after_s=2)
    reason = (job.error or {}).get("detail", "") if job else ""
    raise Conflict(f"Knowledge {knowledge_id!r} could not be read. {reason}".strip())
