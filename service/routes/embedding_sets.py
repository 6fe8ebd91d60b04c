"""Embedding sets: build, describe, read vectors, add unseen classes live, export."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from models.knowledge.names import normalize_class_name, validate_class_names
from service.core import jobs, repositories
from service.core.errors import Conflict, NotFound, UnsupportedMedia
from service.core.ids import new_id
from service.core.tables import Dataset, EmbeddingClass, EmbeddingSet, Job, Knowledge
from service.deps import LongPagingDep, PagingDep, Parts, PartsDep
from service.export import EXPORTERS, ExportFormat, export_rows
from service.json import Encoding, FastJSON, vector_out
from service.planning import Plan, check_knowledge, estimate, plan_embedding_set
from service.problems import documented
from service.routes.knowledge import ready_knowledge
from service.schemas import (
    AddedClasses,
    EmbeddedClass,
    EmbeddingSetCreate,
    EmbeddingSetOut,
    Estimate,
    JobOut,
    NewClasses,
    Page,
)
from service.submit import JOB_HEADERS, submit

router = APIRouter(prefix="/v1/embedding-sets", tags=["embedding sets"])


def embedding_set_out(session: Session, rows: Sequence[EmbeddingSet]) -> list[dict[str, Any]]:
    """Embedding sets as the contract shows them."""
    query = (
        select(EmbeddingClass.embedding_set_id, EmbeddingClass.is_seen, func.count())
        .where(EmbeddingClass.embedding_set_id.in_([row.id for row in rows]))
        .group_by(EmbeddingClass.embedding_set_id, EmbeddingClass.is_seen)
    )
    counts = {(set_id, bool(is_seen)): n for set_id, is_seen, n in session.execute(query)}
    return [
        {
            **{
                name: getattr(row, name)
                for name in (
                    "id",
                    "name",
                    "dataset_id",
                    "knowledge_id",
                    "method",
                    "relation",
                    "params",
                    "status",
                    "dim",
                    "version",
                    "summary",
                    "job_id",
                    "created_at",
                )
            },
            "n_seen": counts.get((row.id, True), 0),
            "n_unseen": counts.get((row.id, False), 0),
        }
        for row in rows
    ]


@router.post(
    "",
    status_code=202,
    response_model=JobOut,
    responses={
        202: {"headers": JOB_HEADERS},
        200: {"model": Estimate, "description": "The estimate, for validate_only."},
        **documented(NotFound, Conflict),
    },
)
async def create_embedding_set(
    body: EmbeddingSetCreate,
    parts: PartsDep,
    validate_only: Annotated[bool, Query(description="Check and estimate; queue nothing.")] = False,
) -> Response:
    """Builds class embeddings in a job; `?validate_only=true` finds every problem and estimates the cost."""
    await run_in_threadpool(ready_knowledge, parts, body.knowledge_id)
    plan, cost = await run_in_threadpool(_plan, parts, body)
    await check_knowledge(parts.inference, body.knowledge_id, plan, required=validate_only)
    if validate_only:
        return FastJSON({**cost, **plan.findings()})
    plan.raise_if_invalid()
    return await run_in_threadpool(_create, parts, body, plan)


def _plan(parts: Parts, body: EmbeddingSetCreate) -> tuple[Plan, dict[str, Any]]:
    with parts.database.read() as session:
        dataset = repositories.get(session, Dataset, body.dataset_id)
        plan = plan_embedding_set(session, dataset, body, parts.settings)
        return plan, estimate(session, plan, body.params)


def _create(parts: Parts, body: EmbeddingSetCreate, plan: Plan) -> Response:
    with parts.database.write() as session:
        repositories.get(session, Dataset, body.dataset_id)  # both may be gone since they were looked at
        repositories.get(session, Knowledge, body.knowledge_id)
        row = EmbeddingSet(
            id=new_id("embedding_set"),
            name=body.name or "",
            dataset_id=body.dataset_id,
            knowledge_id=body.knowledge_id,
            method=body.method,
            relation=body.relation,
            params=body.params.model_dump(mode="json"),
            request={"seen_classes": list(plan.seen_classes), "unseen_classes": list(plan.unseen_classes)},
        )
        row.name = row.name or row.id
        session.add(row)
        session.flush()
        job = jobs.create_job(session, "build_embedding_set", row.id, {}, parts.settings.max_attempts)
        row.job_id = job.id
    return submit(parts, job)


@router.get("", response_model=Page[EmbeddingSetOut])
def list_embedding_sets(parts: PartsDep, paging: PagingDep) -> Response:
    """Embedding sets, newest first."""
    with parts.database.read() as session:
        rows, more = repositories.page(session, EmbeddingSet, limit=paging.limit, cursor=paging.after)
        return FastJSON(paging.out(embedding_set_out(session, rows), more, lambda: rows[-1].id))


@router.get("/{set_id}", response_model=EmbeddingSetOut, responses=documented(NotFound))
def get_embedding_set(set_id: str, parts: PartsDep) -> Response:
    """One embedding set."""
    with parts.database.read() as session:
        return FastJSON(embedding_set_out(session, [repositories.get(session, EmbeddingSet, set_id)])[0])


@router.delete("/{set_id}", status_code=204, responses=documented(NotFound, Conflict))
def delete_embedding_set(set_id: str, parts: PartsDep) -> Response:
    """Deletes a set that nothing uses."""
    with parts.database.write() as session:
        repositories.delete_embedding_set(session, set_id)
    return Response(status_code=204)


@router.get("/{set_id}/classes", response_model=Page[EmbeddedClass], responses=documented(NotFound, Conflict))
def list_classes(
    set_id: str,
    parts: PartsDep,
    paging: LongPagingDep,
    names: Annotated[list[str] | None, Query(max_length=1000, description="Only these; repeat the parameter.")] = None,
    encoding_format: Encoding = "float",
) -> Response:
    """Vectors with seen flag and provenance (contributing seen classes), in the order of the set."""
    with parts.database.read() as session:
        require_ready(session, repositories.get(session, EmbeddingSet, set_id))
        if names is not None:
            rows = repositories.classes_of(session, set_id, names=names)
            missing = sorted(set(names) - {row.name for row in rows})
            if missing:
                raise NotFound(
                    f"The set has no class {missing[0]!r}. Add it with POST /v1/embedding-sets/{set_id}/classes."
                )
            more = False
        else:
            rows = repositories.classes_of(session, set_id, after=paging.position, limit=paging.limit + 1)
            rows, more = rows[: paging.limit], len(rows) > paging.limit
    return FastJSON(paging.out([class_out(row, encoding_format) for row in rows], more, lambda: str(rows[-1].position)))


def class_out(row: EmbeddingClass, encoding: Encoding) -> dict[str, Any]:
    """One class's vector."""
    return {
        "name": row.name,
        "seen": row.is_seen,
        "embedding": vector_out(row.vector, encoding),
        "provenance": row.provenance,
    }


@router.post("/{set_id}/classes", response_model=AddedClasses, responses=documented(NotFound, Conflict))
async def add_classes(set_id: str, body: NewClasses, parts: PartsDep, encoding_format: Encoding = "float") -> Response:
    """Predicts and stores embeddings of new unseen classes, at once; classes it has are returned as stored."""
    names = validate_class_names(body.class_names, field="class_names")
    present = await run_in_threadpool(_present, parts, set_id, names)
    new = [name for name in names if normalize_class_name(name) not in present]
    related = (await parts.inference.relate(set_id, new, body.relation))["classes"] if new else []
    rows = await run_in_threadpool(_store_classes, parts, set_id, names, related)
    return FastJSON({"data": [{**class_out(row, encoding_format), "created": created} for row, created in rows]})


def _present(parts: Parts, set_id: str, names: Sequence[str]) -> set[str]:
    """Normalised names the set already has."""
    with parts.database.read() as session:
        require_ready(session, repositories.get(session, EmbeddingSet, set_id))
        existing = {normalize_class_name(name) for name, _ in repositories.class_names_of(session, set_id)}
    return existing & {normalize_class_name(name) for name in names}


def _store_classes(
    parts: Parts, set_id: str, names: Sequence[str], related: Sequence[dict[str, Any]]
) -> list[tuple[EmbeddingClass, bool]]:
    """The rows of `names`, and whether this request made them; those that are there already stay as they are."""
    with parts.database.write() as session:
        query = select(EmbeddingSet).where(EmbeddingSet.id == set_id).with_for_update()  # one request at a time
        row = session.scalars(query).one_or_none() or repositories.get(session, EmbeddingSet, set_id)
        by_key = {normalize_class_name(name): name for name, _ in repositories.class_names_of(session, set_id)}
        last = session.scalar(
            select(func.max(EmbeddingClass.position)).where(EmbeddingClass.embedding_set_id == set_id)
        )
        created: list[str] = []
        for entry in related:
            key = normalize_class_name(entry["name"])
            if key in by_key:
                continue  # a request at the same time was quicker
            by_key[key] = entry["name"]
            created.append(entry["name"])
            session.add(
                EmbeddingClass(
                    embedding_set_id=set_id,
                    name=entry["name"],
                    position=(-1 if last is None else last) + len(created),
                    is_seen=False,
                    vector=base64.b64decode(entry["vector"]),
                    provenance=entry["provenance"],
                )
            )
        row.version += 1 if created else 0
        session.flush()
        asked = [by_key[normalize_class_name(name)] for name in names]
        stored = {c.name: c for c in repositories.classes_of(session, set_id, names=asked)}
    return [(stored[name], name in created) for name in asked]


def require_ready(session: Session, row: EmbeddingSet) -> EmbeddingSet:
    if row.status == "queued":
        raise Conflict(f"Embedding set {row.id!r} is still being built; wait for job {row.job_id}.", retry_after_s=2)
    if row.status == "failed":
        job = session.get(Job, row.job_id) if row.job_id else None
        reason = (job.error or {}).get("detail", "") if job else ""
        raise Conflict(f"Embedding set {row.id!r} was not built. {reason}".strip())
    return row


@router.get(
    "/{set_id}/export",
    response_class=Response,
    responses={
        200: {"content": {kind.media_type: {} for kind in EXPORTERS.values()}},
        **documented(NotFound, Conflict, UnsupportedMedia),
    },
)
def export(set_id: str, parts: PartsDep, format: ExportFormat = "npz") -> Response:
    """All vectors as a file; `mat` follows xlsa17 (att, original_att, allclasses_names, splits)."""
    with parts.database.read() as session:
        row = require_ready(session, repositories.get(session, EmbeddingSet, set_id))
        classes = repositories.classes_of(session, set_id)
    splits = parts.store.read_bytes(row.artifacts["splits.npz"]) if "splits.npz" in row.artifacts else None
    headers = {"Content-Disposition": f'attachment; filename="{row.id}.{format}"'}
    content = export_rows(format, row, classes, splits)
    return Response(content, media_type=EXPORTERS[format].media_type, headers=headers)
