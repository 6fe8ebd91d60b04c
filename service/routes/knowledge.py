"""Knowledge: word-vector files, tables, inline vectors, text encoders; and how names resolve in them."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from fastapi import APIRouter, Query, Request, Response
from pydantic import TypeAdapter, ValidationError
from starlette.concurrency import run_in_threadpool

from models.errors import InvalidInput
from models.knowledge.names import validate_class_names
from service.core import jobs, repositories
from service.core.errors import Conflict, Invalid, NotFound, TooLarge, UnsupportedMedia
from service.core.ids import new_id
from service.core.tables import Job, Knowledge
from service.deps import PagingDep, Parts, PartsDep
from service.json import FastJSON, dumps
from service.openapi import body_schema
from service.problems import documented, escape, invalid
from service.schemas import JobOut, KnowledgeCreate, KnowledgeKind, KnowledgeOut, LookupOut, Name, Page
from service.submit import JOB_HEADERS, submit
from service.uploads import content_type_of, file_fields, filename_of, multipart, scratch_copy, text_field

router = APIRouter(prefix="/v1/knowledge", tags=["knowledge"])
MAX_NUMBER, MIN_NUMBER = 3.4e38, 1e-37  # what stays finite, and more than zero, as float32
_NAME: TypeAdapter[str] = TypeAdapter(Name)
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
                "application/json": {"schema": body_schema(KnowledgeCreate)},
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
    content_type = content_type_of(request)
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
        filename = filename_of(files[0]).rsplit("/", 1)[-1][-200:]
        if not filename.lower().endswith(SUFFIXES):
            raise UnsupportedMedia(f"{filename!r} has none of the suffixes that are read: {', '.join(SUFFIXES)}.")
        async with scratch_copy(files[0], parts.settings) as path:
            key = await run_in_threadpool(parts.store.put_file, path, move=True)
    payload = {"file": key, "filename": filename}
    return await run_in_threadpool(_create, parts, name, kind, payload)


def _from_json(raw: bytes, parts: Parts) -> Response:
    try:
        body = KnowledgeCreate.model_validate_json(raw)
    except ValidationError as error:
        raise invalid(error.errors(), KnowledgeCreate) from None
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
    validate_class_names(vectors, max_count=parts.settings.max_classes, field="vectors")
    first_name, first = next(iter(vectors.items()))
    if len(first) > parts.settings.max_vector_dim:
        raise TooLarge(f"Vectors have {len(first):,} dimensions; at most {parts.settings.max_vector_dim:,} are taken.")
    for name, vector in vectors.items():
        field = f"vectors/{escape(name)}"
        if len(vector) != len(first):
            message = f"{name!r} has {len(vector)} numbers, {first_name!r} has {len(first)}"
            raise InvalidInput(f"{message}; all vectors need one length.", field=field)
        if not all(abs(x) <= MAX_NUMBER for x in vector):
            raise InvalidInput(
                f"The vector of {name!r} holds NaN, infinity or a number too large for 32 bits. Correct or remove it.",
                field=field,
            )
        if not any(abs(x) >= MIN_NUMBER for x in vector):
            raise InvalidInput(f"The vector of {name!r} is all zeros, so it says nothing. Remove it.", field=field)


def _name(text: str) -> str:
    try:
        return _NAME.validate_python(text)
    except ValidationError:
        raise Invalid("'name' must have 1 to 200 characters, not only spaces, no control characters.") from None


def _create(parts: Parts, name: str, kind: str, payload: dict[str, Any]) -> Response:
    with parts.database.write() as session:
        row = Knowledge(id=new_id("knowledge"), name=name, kind=kind)
        session.add(row)
        job = jobs.create_job(session, "index_knowledge", row.id, payload, parts.settings.max_attempts)
        row.job_id = job.id
    return submit(parts, job)


@router.get("", response_model=Page[KnowledgeOut])
def list_knowledge(parts: PartsDep, paging: PagingDep) -> Response:
    """Knowledge sources, newest first."""
    with parts.database.read() as session:
        rows, more = repositories.page(session, Knowledge, limit=paging.limit, cursor=paging.after)
    return FastJSON(paging.out([knowledge_out(row) for row in rows], more, lambda: rows[-1].id))


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
    names: Annotated[
        list[str], Query(min_length=1, max_length=1000, description="Repeat; or once, separated by commas.")
    ],
) -> Response:
    """Which class names resolve, and how; near entries for those that do not, or only for some of their words."""
    wanted = [name.strip() for name in (names[0].split(",") if len(names) == 1 else names)]
    validate_class_names(wanted, field="names")
    await run_in_threadpool(ready_knowledge, parts, knowledge_id)
    found = (await parts.inference.lookup(knowledge_id, wanted))["resolutions"]
    n_found = sum(entry["found"] for entry in found)
    n_partial = sum(entry["found"] and bool(entry["missing_tokens"]) for entry in found)
    counts = {"n_found": n_found, "n_missing": len(found) - n_found, "n_partial": n_partial}
    return FastJSON({"knowledge_id": knowledge_id, **counts, "data": found})


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
