"""All SQL of the resources. Functions take a Session and never commit: the caller's transaction does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, bindparam, func, select
from sqlalchemy.orm import Session

from service.core.db import Database, utc_now
from service.core.errors import Conflict, NotFound
from service.core.jobs import TERMINAL, has_resource
from service.core.tables import (
    Base,
    CachedArtifact,
    Classifier,
    Dataset,
    EmbeddingClass,
    EmbeddingSet,
    FeatureRows,
    Image,
    Job,
    Knowledge,
    PredictionSet,
    Worker,
)

Row = TypeVar("Row", bound=Base)
Contents = TypeVar("Contents", Image, FeatureRows)
_CHUNK = 500  # bound variables of one statement stay below every database's limit

NAMES: dict[type[Base], str] = {
    Dataset: "dataset",
    Knowledge: "knowledge source",
    EmbeddingSet: "embedding set",
    Classifier: "classifier",
    PredictionSet: "set of predictions",
    Job: "job",
    Image: "image",
}


def get(session: Session, table: type[Row], row_id: str) -> Row:
    """The row, or NotFound naming kind and id."""
    row = session.get(table, row_id)
    if row is None:
        raise _missing(table, row_id)
    return row


def _missing(table: type[Base], row_id: str) -> NotFound:
    return NotFound(f"There is no {NAMES[table]} {row_id!r}. List the existing ones with GET.")


def page(
    session: Session, table: type[Row], *, limit: int, cursor: str | None, where: Sequence[ColumnElement[bool]] = ()
) -> tuple[list[Row], bool]:
    """Newest first, starting after the id `cursor`; and whether more follow."""
    key: Any = table.__table__.c["id"]
    query = select(table).where(*where).order_by(key.desc()).limit(limit + 1)
    if cursor is not None:
        query = query.where(key < cursor)
    rows = list(session.scalars(query))
    return rows[:limit], len(rows) > limit


def chunks(values: Sequence[str]) -> Iterable[Sequence[str]]:
    """`values` in pieces that fit into one statement's variables."""
    for start in range(0, len(values), _CHUNK):
        yield values[start : start + _CHUNK]


# ---- datasets ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassCount:
    """How many images of a class are accepted, and how many of them are fixed as train or test."""

    class_name: str
    n_images: int
    n_train: int
    n_test: int


def class_counts(session: Session, dataset_id: str) -> list[ClassCount]:
    """Per class, by name."""
    query = (
        select(
            Image.class_name,
            func.count(),
            func.count().filter(Image.split == "train"),
            func.count().filter(Image.split == "test"),
        )
        .where(Image.dataset_id == dataset_id)
        .group_by(Image.class_name)
        .order_by(Image.class_name)
    )
    return [ClassCount(*row) for row in session.execute(query)]


def count_images(session: Session, dataset_ids: Sequence[str]) -> dict[str, tuple[int, int]]:
    """dataset id -> (images, classes)."""
    query = (
        select(Image.dataset_id, func.count(), func.count(Image.class_name.distinct()))
        .where(Image.dataset_id.in_(dataset_ids))
        .group_by(Image.dataset_id)
    )
    return {dataset_id: (images, classes) for dataset_id, images, classes in session.execute(query)}


def images_of(session: Session, dataset_id: str, class_names: Sequence[str] | None = None) -> list[Image]:
    """All images of a dataset (or of some classes), in a stable order: class, then content."""
    query = select(Image).where(Image.dataset_id == dataset_id)
    if class_names is None:
        rows = list(session.scalars(query))
    else:
        rows = [
            row
            for part in chunks(list(class_names))
            for row in session.scalars(query.where(Image.class_name.in_(part)))
        ]
    return sorted(rows, key=lambda row: (row.class_name, row.sha256))


def by_content(session: Session, table: type[Contents], sha256s: Sequence[str], *where: Any) -> dict[str, Contents]:
    """sha256 -> row of `table`, for those of `sha256s` that have one."""
    query = select(table).where(*where)
    return {
        row.sha256: row
        for part in chunks(list(sha256s))
        for row in session.scalars(query.where(table.sha256.in_(part)))
    }


def images_by_content(session: Session, dataset_id: str, sha256s: Sequence[str]) -> dict[str, Image]:
    """sha256 -> image, for those the dataset already holds."""
    return by_content(session, Image, sha256s, Image.dataset_id == dataset_id)


def delete_dataset(session: Session, dataset_id: str) -> None:
    """Deletes a dataset; Conflict while an embedding set, a classifier, predictions or an unfinished job use it."""
    dataset = get(session, Dataset, dataset_id)
    users = [
        *session.scalars(select(EmbeddingSet.id).where(EmbeddingSet.dataset_id == dataset_id).limit(3)),
        *session.scalars(select(Classifier.id).where(Classifier.dataset_id == dataset_id).limit(3)),
        *session.scalars(select(PredictionSet.id).where(PredictionSet.dataset_id == dataset_id).limit(3)),
        *active_jobs_of(session, dataset_id),
    ]
    _refuse_if_used("dataset", dataset_id, users)
    session.delete(dataset)


# ---- knowledge, embedding sets, classifiers ---------------------------------------------------


def delete_knowledge(session: Session, knowledge_id: str) -> None:
    """Deletes a knowledge source; Conflict while something uses it."""
    knowledge = get(session, Knowledge, knowledge_id)
    needs_it = Classifier.request["dimension_knowledge_id"].as_string() == knowledge_id
    users = [
        *session.scalars(select(EmbeddingSet.id).where(EmbeddingSet.knowledge_id == knowledge_id).limit(3)),
        *session.scalars(select(Classifier.id).where(Classifier.knowledge_id == knowledge_id).limit(3)),
        *session.scalars(select(Classifier.id).where(Classifier.status == "queued", needs_it).limit(3)),
        *active_jobs_of(session, knowledge_id),
    ]
    _refuse_if_used("knowledge source", knowledge_id, users)
    session.delete(knowledge)


def delete_embedding_set(session: Session, set_id: str) -> None:
    """Deletes an embedding set and its classes; Conflict while something uses it."""
    row = get(session, EmbeddingSet, set_id)
    users = [
        *session.scalars(select(Classifier.id).where(Classifier.embedding_set_id == set_id).limit(3)),
        *active_jobs_of(session, set_id),
    ]
    _refuse_if_used("embedding set", set_id, users)
    session.delete(row)


def delete_classifier(session: Session, classifier_id: str) -> None:
    """Deletes a classifier; Conflict while its job runs, or predictions of it are there."""
    row = get(session, Classifier, classifier_id)
    users = session.scalars(select(PredictionSet.id).where(PredictionSet.classifier_id == classifier_id).limit(3))
    _refuse_if_used("classifier", classifier_id, [*users, *active_jobs_of(session, classifier_id)])
    session.delete(row)


def delete_predictions(session: Session, predictions_id: str) -> None:
    """Deletes a set of predictions; Conflict while its job runs."""
    row = get(session, PredictionSet, predictions_id)
    _refuse_if_used("set of predictions", predictions_id, active_jobs_of(session, predictions_id))
    session.delete(row)


def active_jobs_of(session: Session, resource_id: str) -> list[str]:
    """Unfinished jobs that make or fill a resource."""
    query = select(Job.id).where(Job.resource_id == resource_id, Job.status.in_(("queued", "running", "cancelling")))
    return list(session.scalars(query.limit(3)))


def _refuse_if_used(kind: str, row_id: str, users: Sequence[str]) -> None:
    if users:
        raise Conflict(f"The {kind} {row_id!r} is in use by {', '.join(users)}. Delete or cancel those first.")


def find_embedding_set(session: Session, id_or_name: str) -> EmbeddingSet:
    """By id, else the newest ready set of that name, else the newest of that name."""
    row = session.get(EmbeddingSet, id_or_name)
    if row is None:
        query = select(EmbeddingSet).where(EmbeddingSet.name == id_or_name)
        is_ready = EmbeddingSet.status == "ready"
        row = session.scalars(query.order_by(is_ready.desc(), EmbeddingSet.id.desc()).limit(1)).first()
    if row is None:
        raise NotFound(
            f"There is no embedding set with id or name {id_or_name!r}. List them with GET /v1/embedding-sets."
        )
    return row


def classes_of(
    session: Session, set_id: str, *, names: Sequence[str] | None = None, after: int = -1, limit: int | None = None
) -> list[EmbeddingClass]:
    """Classes of an embedding set by position: all, those named, or a page after a position."""
    query = select(EmbeddingClass).where(EmbeddingClass.embedding_set_id == set_id).order_by(EmbeddingClass.position)
    if names is not None:
        rows = [
            row for part in chunks(list(names)) for row in session.scalars(query.where(EmbeddingClass.name.in_(part)))
        ]
        return sorted(rows, key=lambda row: row.position)
    return list(session.scalars(query.where(EmbeddingClass.position > after).limit(limit)))


def class_names_of(session: Session, set_id: str) -> list[tuple[str, bool]]:
    """(name, is_seen) of every class of an embedding set, by position."""
    query = (
        select(EmbeddingClass.name, EmbeddingClass.is_seen)
        .where(EmbeddingClass.embedding_set_id == set_id)
        .order_by(EmbeddingClass.position)
    )
    return [(name, is_seen) for name, is_seen in session.execute(query)]


@dataclass(frozen=True)
class ClassifierState:
    """What answering with a classifier needs of its row; metrics, which may be large, stay unread.

    version: of its embedding set; 0 without one.
    """

    id: str
    method: str
    status: str
    job_id: str | None
    embedding_set_id: str | None
    knowledge_id: str | None
    version: int


_CLASSIFIER_STATE = (
    select(
        Classifier.id, Classifier.method, Classifier.status, Classifier.job_id, Classifier.embedding_set_id,
        Classifier.knowledge_id, func.coalesce(EmbeddingSet.version, 0),
    )
    .outerjoin(EmbeddingSet, Classifier.embedding_set_id == EmbeddingSet.id)
    .where(Classifier.id == bindparam("classifier_id"))
)  # fmt: skip
_NEWEST = select(Classifier.id).where(Classifier.status == "ready").order_by(Classifier.id.desc()).limit(1)
_NEWEST_OF_METHOD = _NEWEST.where(Classifier.method == bindparam("method"))


def classifier_state(session: Session, classifier_id: str) -> ClassifierState:
    """Of one classifier; NotFound where there is none."""
    return _state(classifier_id, session.execute(_CLASSIFIER_STATE, {"classifier_id": classifier_id}).first())


def newest_classifier(session: Session) -> str | None:
    """The id of the newest ready classifier."""
    return session.scalars(_NEWEST).first()


async def classifier_now(database: Database, classifier_id: str | None, method: str | None = None) -> ClassifierState:
    """`classifier_state` of the one asked for, else of the newest ready one (of `method`), as fast as may be."""
    if classifier_id is None:
        query, values = (_NEWEST, {}) if method is None else (_NEWEST_OF_METHOD, {"method": method})
        newest = await database.first(query, **values)
        if newest is None:
            of_method = f" of method {method!r}" if method else ""
            raise NotFound(f"There is no ready classifier{of_method}; train one with POST /v1/classifiers.")
        classifier_id = str(newest[0])
    return _state(classifier_id, await database.first(_CLASSIFIER_STATE, classifier_id=classifier_id))


def _state(classifier_id: str, row: Sequence[Any] | None) -> ClassifierState:
    if row is None:
        raise _missing(Classifier, classifier_id)
    return ClassifierState(*row)


def remaining(session: Session, ids: Sequence[str]) -> set[str]:
    """Those of `ids` that classifiers or embedding sets still have."""
    found: set[str] = set()
    for part in chunks(ids):
        for column in (Classifier.id, EmbeddingSet.id):
            found.update(session.scalars(select(column).where(column.in_(part))))
    return found


def measured_rate(session: Session, backbone: str) -> tuple[str, float] | None:
    """(embedding set, patches per second) of the newest finished job with this backbone, if one measured it."""
    query = select(EmbeddingSet).where(EmbeddingSet.status == "ready").order_by(EmbeddingSet.id.desc()).limit(50)
    for row in session.scalars(query):
        rate = row.summary.get("patches_per_s")
        if rate and row.params.get("backbone", {}).get("name") == backbone:
            return row.id, float(rate)
    return None


def measured_training_rate(session: Session, backbone: str) -> float | None:
    """Images a second at which the newest network of that name was trained from scratch, if one was."""
    query = select(CachedArtifact).where(CachedArtifact.key.startswith("backbone-"))
    for row in session.scalars(query.order_by(CachedArtifact.created_at.desc()).limit(50)):
        if row.summary.get("name") == backbone and row.summary.get("images_per_s"):
            return float(row.summary["images_per_s"])
    return None


def count_jobs(session: Session) -> dict[tuple[str, str], int]:
    """How many jobs there are of each (kind, status)."""
    query = select(Job.kind, Job.status, func.count()).group_by(Job.kind, Job.status)
    return {(kind, status): n for kind, status, n in session.execute(query)}


def live_workers(session: Session, within_s: float) -> list[Worker]:
    """Workers heard of in the last so many seconds."""
    since = utc_now() - timedelta(seconds=within_s)
    return list(session.scalars(select(Worker).where(Worker.heartbeat_at >= since)))


# ---- artifacts --------------------------------------------------------------------------------


def artifact_keys(session: Session) -> set[str]:
    """Keys of all artifacts that rows name, but for images (see `stored_contents`). A job needs its own until it
    has succeeded: one that failed can be tried again while what it was to make or fill is there."""
    keys = set(session.scalars(select(FeatureRows.shard).distinct()))
    keys.update(session.scalars(select(CachedArtifact.artifact)))
    queries: list[Select[tuple[dict[str, Any]]]] = [
        select(Dataset.artifacts),
        select(Knowledge.artifacts),
        select(EmbeddingSet.artifacts),
        select(Classifier.artifacts),
        select(PredictionSet.artifacts),
        select(CachedArtifact.summary),
        select(Job.payload).where(Job.status != "succeeded", Job.status.not_in(TERMINAL) | has_resource()),
    ]
    for query in queries:
        for value in session.scalars(query):
            keys.update(_strings(value))
    return keys


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def stored_contents(session: Session, sha256s: Sequence[str]) -> set[str]:
    """Those of `sha256s` that are the content of an image of any dataset."""
    query = select(Image.sha256).distinct()
    return {found for part in chunks(sha256s) for found in session.scalars(query.where(Image.sha256.in_(part)))}
