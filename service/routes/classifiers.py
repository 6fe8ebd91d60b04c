"""Zero-shot classifiers: train, describe, delete."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from models.catalog import get_method
from models.data.splits import validation_classes
from models.errors import UnknownName
from models.knowledge.names import normalize_class_name
from models.params import EmbeddingSetParams, search_space
from service.classifier_cost import plan_memory
from service.core import jobs, repositories
from service.core.classifier_inputs import earlier_validation
from service.core.errors import Conflict, NotFound
from service.core.ids import new_id
from service.core.tables import Classifier, Dataset, EmbeddingSet, Knowledge
from service.deps import PagingDep, Parts, PartsDep
from service.json import FastJSON
from service.planning import (
    Plan,
    check_knowledge,
    dataset_class_sizes,
    plan_backbone,
    plan_classes,
    plan_dimensions,
    plan_features,
    plan_known,
    plan_tuning,
    plan_unseen,
    plan_validation,
)
from service.problems import documented, validation_problems
from service.routes.embedding_sets import require_ready
from service.routes.knowledge import ready_knowledge
from service.schemas import ClassifierCreate, ClassifierEstimate, ClassifierOut, JobOut, Page
from service.submit import JOB_HEADERS, submit

router = APIRouter(prefix="/v1/classifiers", tags=["classifiers"])
FIELDS = (
    "id",
    "name",
    "dataset_id",
    "embedding_set_id",
    "knowledge_id",
    "method",
    "params",
    "status",
    "metrics",
    "job_id",
    "created_at",
)


def classifier_out(row: Classifier) -> dict[str, Any]:
    """A classifier as the contract shows it."""
    return {name: getattr(row, name) for name in FIELDS}


def listed(row: Classifier) -> dict[str, Any]:
    """The same in a list: without the confusions, which may have as many entries as there are test images."""
    short = {
        name: {key: value for key, value in part.items() if key != "confusion"}
        for name in ("zsl", "gzsl")
        if (part := row.metrics.get(name))
    }
    return {**classifier_out(row), "metrics": {**row.metrics, **short}}


@router.post(
    "",
    status_code=202,
    response_model=JobOut,
    responses={
        202: {"headers": JOB_HEADERS},
        200: {"model": ClassifierEstimate, "description": "The estimate, for validate_only."},
        **documented(NotFound, Conflict),
    },
)
async def create_classifier(
    body: ClassifierCreate,
    parts: PartsDep,
    validate_only: Annotated[bool, Query(description="Check and estimate; queue nothing.")] = False,
) -> Response:
    """Trains a classifier in a job; `?validate_only=true` finds every problem and estimates the memory."""
    for needed in (body.knowledge_id, body.dimension_knowledge_id):
        if needed is not None:
            await run_in_threadpool(ready_knowledge, parts, needed)
    plan, params, cost = await run_in_threadpool(_plan, parts, body)
    if body.knowledge_id is not None:
        await check_knowledge(parts.inference, body.knowledge_id, plan, required=validate_only)
    if validate_only:
        return FastJSON({**cost, **plan.findings()})
    plan.raise_if_invalid()
    return await run_in_threadpool(_create, parts, body, plan, params)


def _plan(parts: Parts, body: ClassifierCreate) -> tuple[Plan, dict[str, Any], dict[str, Any]]:
    plan = Plan()
    params = _plan_method(plan, body)
    if (body.embedding_set_id is None) == (body.knowledge_id is None):
        plan.add("/embedding_set_id", "Give either embedding_set_id or knowledge_id, and not both.")
        return plan, params, {"n_images": 0, "memory_bytes": None, "basis": ""}
    with parts.database.read() as session:
        dataset = repositories.get(session, Dataset, body.dataset_id)
        sizes = dataset_class_sizes(session, dataset)
        seen, unseen, known = body.seen_classes, body.unseen_classes, None
        network, embedding_set = body.backbone, None
        if body.embedding_set_id is not None:
            embedding_set = require_ready(session, repositories.get(session, EmbeddingSet, body.embedding_set_id))
            known = dict(repositories.class_names_of(session, embedding_set.id))
            network = network or EmbeddingSetParams.model_validate(embedding_set.params).backbone
            seen, unseen = _classes_from_set(known, seen, unseen)
            plan_dimensions(plan, body, embedding_set.dim, ())
        else:
            used = repositories.get(session, Knowledge, body.knowledge_id or "")
            plan_dimensions(plan, body, used.dim, used.summary.get("attribute_names") or ())
        plan_classes(plan, sizes, seen, unseen or [], parts.settings.max_classes, spelled=known)
        earlier = earlier_validation(dataset, embedding_set)
        validation = validation_classes(plan.seen_classes, body.validation_classes, earlier, seed=body.seed)
        cost = plan_memory(
            session, plan, dataset, embedding_set, body, params, network, len(validation), parts.settings
        )
        if known is not None:
            plan_known(plan, "/unseen_classes", plan.unseen_classes, known, "embedding set")
            plan_known(plan, "/seen_classes", plan.seen_classes, known, "embedding set")
            plan_unseen(plan, known)
        if dataset.kind == "images" and body.backbone is not None:
            plan_backbone(plan, body.backbone, parts.settings, "/backbone")
        elif dataset.kind == "images" and body.embedding_set_id is None:
            plan.add("/backbone", "With knowledge_id, say which network makes the image features: 'backbone'.")
        elif dataset.kind == "features":
            plan_features(plan, body.method)
        if dataset.kind == "images" and network is not None:
            plan_tuning(plan, params, network.name)
        if body.scratch is not None and (body.backbone is None or body.backbone.weights != "scratch"):
            plan.add("/scratch", "Nothing is trained from scratch: give a 'backbone' with weights 'scratch', too.")
    plan_validation(plan, body.validation_classes, "/validation_classes")
    if body.search is not None:
        _plan_search(plan, body, len(validation))
    if body.best_on_test:
        _plan_best_on_test(plan, body, params)
    return plan, params, cost


def _plan_best_on_test(plan: Plan, body: ClassifierCreate, params: dict[str, Any]) -> None:
    """There are epochs to be the best of, and test rows to measure them on."""
    if not body.evaluate:
        plan.add("/best_on_test", "The best epoch on test rows needs 'evaluate': true.")
    if params and "epochs" not in params:
        plan.add("/best_on_test", f"{body.method!r} does not learn in epochs; leave 'best_on_test' out.")


def _plan_search(plan: Plan, body: ClassifierCreate, n_validation: int) -> None:
    """There is something to search, and something to search on."""
    if plan.seen_classes and not n_validation:
        plan.add("/search", "A search needs validation classes: name some, or give at least 4 seen classes.")
    elif n_validation == 1 and body.search is not None and body.search.metric == "t1":
        plan.add(
            "/search/metric",
            "Among a single validation class every answer is right, so that T1 tells nothing. Name two or more in "
            "validation_classes, or use 'h'.",
        )
    try:
        space = search_space(get_method(body.method, "classifier").params)
    except UnknownName:
        return  # told already
    if not space:
        plan.add("/search", f"{body.method!r} chooses its settings by itself; leave 'search' out.")
    elif not set(space) - set(body.params):
        plan.add("/search", f"All that could be searched is given in 'params': {', '.join(space)}.")


def _plan_method(plan: Plan, body: ClassifierCreate) -> dict[str, Any]:
    try:
        method = get_method(body.method, "classifier")
        return method.params.model_validate(body.params).model_dump(mode="json")
    except UnknownName as error:
        plan.add("/method", str(error))
    except ValidationError as error:
        plan.problems += validation_problems(error.errors(), method.params, "/params")
    return {}


def _classes_from_set(
    known: dict[str, bool], seen: list[str] | None, unseen: list[str] | None
) -> tuple[list[str], list[str]]:
    """What the caller leaves out comes from the embedding set (class name -> whether it is seen)."""
    if seen is None:
        keys = set(map(normalize_class_name, unseen or ()))
        seen = [name for name, is_seen in known.items() if is_seen and normalize_class_name(name) not in keys]
    if unseen is None:
        keys = set(map(normalize_class_name, seen))
        unseen = [name for name, is_seen in known.items() if not is_seen and normalize_class_name(name) not in keys]
    return seen, unseen


def _create(parts: Parts, body: ClassifierCreate, plan: Plan, params: dict[str, Any]) -> Response:
    with parts.database.write() as session:
        repositories.get(session, Dataset, body.dataset_id)  # may be gone since it was looked at
        if body.dimension_knowledge_id is not None:
            repositories.get(session, Knowledge, body.dimension_knowledge_id)
        row = Classifier(
            id=new_id("classifier"),
            name=body.name or "",
            dataset_id=body.dataset_id,
            embedding_set_id=body.embedding_set_id,
            knowledge_id=body.knowledge_id,
            method=body.method,
            params=params,
            request={
                "seen_classes": list(plan.seen_classes),
                "unseen_classes": list(plan.unseen_classes),
                "validation_classes": body.validation_classes,
                "dimension_names": body.dimension_names,
                "dimension_knowledge_id": body.dimension_knowledge_id,
                "backbone": body.backbone.model_dump(mode="json") if body.backbone else None,
                "scratch": body.scratch.model_dump(mode="json") if body.scratch else None,
                "image_size": body.image_size,
                "evaluate": body.evaluate,
                "best_on_test": body.best_on_test,
                "search": body.search.model_dump(mode="json") if body.search else None,
                "search_fixed": sorted(body.params),
                "seed": body.seed,
            },
        )
        row.name = row.name or row.id
        session.add(row)
        session.flush()
        job = jobs.create_job(session, "train_classifier", row.id, {}, parts.settings.max_attempts)
        row.job_id = job.id
    return submit(parts, job)


@router.get("", response_model=Page[ClassifierOut])
def list_classifiers(parts: PartsDep, paging: PagingDep) -> Response:
    """Classifiers, newest first; their metrics without the confusions."""
    with parts.database.read() as session:
        rows, more = repositories.page(session, Classifier, limit=paging.limit, cursor=paging.after)
    return FastJSON(paging.out([listed(row) for row in rows], more, lambda: rows[-1].id))


@router.get("/{classifier_id}", response_model=ClassifierOut, responses=documented(NotFound))
def get_classifier(classifier_id: str, parts: PartsDep) -> Response:
    """One classifier with its metrics."""
    with parts.database.read() as session:
        return FastJSON(classifier_out(repositories.get(session, Classifier, classifier_id)))


@router.delete("/{classifier_id}", status_code=204, responses=documented(NotFound, Conflict))
def delete_classifier(classifier_id: str, parts: PartsDep) -> Response:
    """Deletes a classifier."""
    with parts.database.write() as session:
        repositories.delete_classifier(session, classifier_id)
    return Response(status_code=204)
