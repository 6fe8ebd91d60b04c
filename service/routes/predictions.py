"""Batch classification: a classifier's predictions for all images of a dataset, in pages or as a file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from fastapi import APIRouter, Query, Response
from fastapi.responses import FileResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from models.knowledge.names import validate_class_names
from service.answers import PredictedImage, PredictionsCreate, PredictionsOut
from service.core import jobs, repositories
from service.core.errors import Conflict, Invalid, NotFound, Problem
from service.core.ids import new_id
from service.core.tables import OFFSETS_FILE, RESULTS_FILE, Classifier, Dataset, PredictionSet
from service.deps import LongPagingDep, PagingDep, Parts, PartsDep
from service.image_requests import ready_classifier
from service.json import FastJSON
from service.problems import documented
from service.schemas import JobOut, Page
from service.submit import JOB_HEADERS, submit

router = APIRouter(prefix="/v1/predictions", tags=["classify"])
FIELDS = ("id", "name", "classifier_id", "dataset_id", "request", "status", "summary", "job_id", "created_at")


def predictions_out(row: PredictionSet) -> dict[str, Any]:
    """A set of predictions as the contract shows it."""
    return {name: getattr(row, name) for name in FIELDS}


@router.post(
    "",
    status_code=202,
    response_model=JobOut,
    responses={202: {"headers": JOB_HEADERS}, **documented(NotFound, Conflict)},
)
async def create_predictions(body: PredictionsCreate, parts: PartsDep) -> Response:
    """Classifies all images of a dataset in a job, however many; features that are there already are used."""
    chosen = await ready_classifier(parts, body.classifier_id)
    return await run_in_threadpool(_create, body, parts, chosen.id)


def _create(body: PredictionsCreate, parts: Parts, classifier_id: str) -> Response:
    names = body.class_names and list(validate_class_names(body.class_names, field="class_names"))
    with parts.database.write() as session:
        _require_images(repositories.get(session, Dataset, body.dataset_id))
        if not repositories.get(session, Classifier, classifier_id).metrics.get("backbone"):
            raise _invalid("/classifier_id", "The classifier was trained on precomputed features and reads no images.")
        known = {count.class_name for count in repositories.class_counts(session, body.dataset_id)}
        if not known:
            raise _invalid("/dataset_id", "The dataset has no images yet; upload some first.")
        if missing := [name for name in body.only_classes or () if name not in known]:
            raise _invalid("/only_classes", f"The dataset has no class {missing[0]!r}.")
        request = body.model_dump(mode="json", exclude={"name", "classifier_id", "dataset_id"}) | {"class_names": names}
        row = PredictionSet(
            id=new_id("predictions"),
            name=body.name or "",
            classifier_id=classifier_id,
            dataset_id=body.dataset_id,
            request=request,
        )
        row.name = row.name or row.id
        session.add(row)
        session.flush()
        job = jobs.create_job(session, "classify_dataset", row.id, {}, parts.settings.max_attempts)
        row.job_id = job.id
    return submit(parts, job)


@router.get("", response_model=Page[PredictionsOut])
def list_predictions(parts: PartsDep, paging: PagingDep) -> Response:
    """Sets of predictions, newest first."""
    with parts.database.read() as session:
        rows, more = repositories.page(session, PredictionSet, limit=paging.limit, cursor=paging.after)
    return FastJSON(paging.out([predictions_out(row) for row in rows], more, lambda: rows[-1].id))


@router.get("/{predictions_id}", response_model=PredictionsOut, responses=documented(NotFound))
def get_predictions(predictions_id: str, parts: PartsDep) -> Response:
    """One set of predictions, all images together."""
    with parts.database.read() as session:
        return FastJSON(predictions_out(repositories.get(session, PredictionSet, predictions_id)))


@router.get("/{predictions_id}/items", response_model=Page[PredictedImage], responses=documented(NotFound, Conflict))
def list_items(predictions_id: str, parts: PartsDep, paging: LongPagingDep) -> Response:
    """The predictions image by image, by the dataset's classes."""
    results, offsets = _files(parts, predictions_id)
    start = paging.position + 1
    end = min(start + paging.limit, len(offsets) - 1)
    items: list[Any] = []
    if start < end:
        with results.open("rb") as file:
            file.seek(int(offsets[start]))
            items = [orjson.loads(line) for line in file.read(int(offsets[end] - offsets[start])).splitlines()]
    return FastJSON(paging.out(items, end < len(offsets) - 1, lambda: str(end - 1)))


@router.get(
    "/{predictions_id}/export",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"application/x-ndjson": {}, "text/csv": {}}, "description": "The file."},
        **documented(NotFound, Conflict),
    },
)
def export_predictions(
    predictions_id: str,
    parts: PartsDep,
    format: Annotated[
        Literal["jsonl", "csv"], Query(description="A line an image: JSON as in items, or columns.")
    ] = "jsonl",
) -> Response:
    """All of it in one file."""
    results, _ = _files(parts, predictions_id)
    name = f"{predictions_id}.{format}"
    if format == "jsonl":
        return FileResponse(results, media_type="application/x-ndjson", filename=name)
    with parts.database.read() as session:
        top_k = int(repositories.get(session, PredictionSet, predictions_id).request["top_k"])
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(_csv(results, top_k), media_type="text/csv", headers=headers)


@router.delete("/{predictions_id}", status_code=204, responses=documented(NotFound, Conflict))
def delete_predictions(predictions_id: str, parts: PartsDep) -> Response:
    """Deletes a set of predictions."""
    with parts.database.write() as session:
        repositories.delete_predictions(session, predictions_id)
    return Response(status_code=204)


def _require_images(dataset: Dataset) -> None:
    if dataset.kind != "images":
        raise _invalid("/dataset_id", "The dataset holds feature vectors; predictions are made of images.")


def _invalid(pointer: str, message: str) -> Invalid:
    return Invalid(message, problems=[Problem(pointer, message)])


def _files(parts: Parts, predictions_id: str) -> tuple[Path, np.ndarray[Any, np.dtype[np.int64]]]:
    """Where the lines lie on this machine, and where each begins; Conflict before they are there."""
    with parts.database.read() as session:
        row = repositories.get(session, PredictionSet, predictions_id)
    if row.status != "ready":
        raise Conflict(f"The predictions {row.id!r} are {row.status}; see job {row.job_id}.", retry_after_s=2)
    offsets = np.frombuffer(parts.store.read_bytes(row.artifacts[OFFSETS_FILE]), "<i8")
    return parts.store.local_path(row.artifacts[RESULTS_FILE]), offsets


def _csv(results: Path, top_k: int) -> Iterator[str]:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ranks = range(1, top_k + 1)
    about = ("index", "image_id", "filename", "class_name", "error", "abstained")
    writer.writerow([*about, *(f"{what}_{n}" for n in ranks for what in ("label", "score"))])
    with results.open("rb") as file:
        for line in file:
            item = orjson.loads(line)
            found = [value for p in item["predictions"] for value in (p["label"], repr(p["score"]))]
            writer.writerow([*(_cell(item[name]) for name in about), *found])
            if out.tell() > 2**16:
                yield out.getvalue()
                out.seek(0)
                out.truncate()
    yield out.getvalue()


def _cell(value: Any) -> Any:
    """As the other exports write it: JSON's words for true and false, nothing for null."""
    return "" if value is None else str(value).lower() if isinstance(value, bool) else value
