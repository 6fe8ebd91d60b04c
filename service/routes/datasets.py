"""Datasets: create, list, describe, delete; their classes, images and thumbnails."""

from __future__ import annotations

from bisect import bisect_right
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from sqlalchemy.orm import Session

from models.data.images import make_thumbnail
from service.core import repositories
from service.core.artifacts import image_key
from service.core.errors import Conflict, NotFound
from service.core.ids import new_id
from service.core.tables import Dataset, Image
from service.deps import LongPagingDep, PagingDep, PartsDep
from service.json import FastJSON
from service.problems import documented
from service.schemas import (
    ClassOut,
    DatasetCreate,
    DatasetOut,
    ImageOut,
    Page,
)

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])


def dataset_out(session: Session, rows: list[Dataset]) -> list[dict[str, Any]]:
    """Datasets as the contract shows them."""
    counts = repositories.count_images(session, [row.id for row in rows])
    return [
        {
            "id": row.id,
            "name": row.name,
            "description": row.description,
            "metadata": row.meta,
            "kind": row.kind,
            "test_fraction": row.test_fraction,
            "summary": row.summary,
            "created_at": row.created_at,
            "n_images": row.summary.get("n_rows", 0) if row.kind == "features" else counts.get(row.id, (0, 0))[0],
            "n_classes": row.summary.get("n_classes", 0) if row.kind == "features" else counts.get(row.id, (0, 0))[1],
        }
        for row in rows
    ]


@router.post("", status_code=201, response_model=DatasetOut)
def create_dataset(body: DatasetCreate, parts: PartsDep) -> Response:
    """A new, empty dataset."""
    with parts.database.write() as session:
        row = Dataset(
            id=new_id("dataset"),
            name=body.name,
            description=body.description,
            meta=body.metadata,
            test_fraction=body.test_fraction,
        )
        session.add(row)
        session.flush()
        out = dataset_out(session, [row])[0]
    return FastJSON(out, status_code=201, headers={"Location": f"/v1/datasets/{row.id}"})


@router.get("", response_model=Page[DatasetOut])
def list_datasets(parts: PartsDep, paging: PagingDep) -> Response:
    """Datasets, newest first."""
    with parts.database.read() as session:
        rows, more = repositories.page(session, Dataset, limit=paging.limit, cursor=paging.after)
        return FastJSON(paging.out(dataset_out(session, rows), more, lambda: rows[-1].id))


@router.get("/{dataset_id}", response_model=DatasetOut, responses=documented(NotFound))
def get_dataset(dataset_id: str, parts: PartsDep) -> Response:
    """One dataset."""
    with parts.database.read() as session:
        return FastJSON(dataset_out(session, [repositories.get(session, Dataset, dataset_id)])[0])


@router.delete("/{dataset_id}", status_code=204, responses=documented(NotFound, Conflict))
def delete_dataset(dataset_id: str, parts: PartsDep) -> Response:
    """Deletes a dataset that nothing uses."""
    with parts.database.write() as session:
        repositories.delete_dataset(session, dataset_id)
    return Response(status_code=204)


@router.get("/{dataset_id}/classes", response_model=Page[ClassOut], responses=documented(NotFound))
def list_classes(dataset_id: str, parts: PartsDep, paging: LongPagingDep) -> Response:
    """Classes with their counts, by name."""
    with parts.database.read() as session:
        row = repositories.get(session, Dataset, dataset_id)
        if row.kind == "features":
            items = _feature_classes(row)
        else:
            items = [vars(count) for count in repositories.class_counts(session, dataset_id)]
    # Databases sort by rules of their own; pages need one order.
    names = sorted(item["class_name"] for item in items)
    rest = names[bisect_right(names, paging.after) :] if paging.after is not None else names
    page = set(rest[: paging.limit])
    shown = sorted((item for item in items if item["class_name"] in page), key=lambda item: str(item["class_name"]))
    return FastJSON(paging.out(shown, len(rest) > paging.limit, lambda: str(shown[-1]["class_name"])))


def _feature_classes(row: Dataset) -> list[dict[str, Any]]:
    train = row.summary.get("train_classes", {})
    return [
        {"class_name": name, "n_images": n, "n_train": train.get(name, 0), "n_test": n - train.get(name, 0)}
        for name, n in row.summary.get("classes", {}).items()
    ]


@router.get("/{dataset_id}/images", response_model=Page[ImageOut], responses=documented(NotFound))
def list_images(
    dataset_id: str,
    parts: PartsDep,
    paging: PagingDep,
    class_name: Annotated[str | None, Query(max_length=256)] = None,
) -> Response:
    """Images, newest first; of one class if asked."""
    where = [Image.dataset_id == dataset_id]
    if class_name is not None:
        where.append(Image.class_name == class_name)
    with parts.database.read() as session:
        repositories.get(session, Dataset, dataset_id)
        rows, more = repositories.page(session, Image, limit=paging.limit, cursor=paging.after, where=where)
    items = [
        {
            "id": row.id,
            "sha256": row.sha256,
            "class_name": row.class_name,
            "filename": row.filename,
            "width": row.width,
            "height": row.height,
            "split": row.split,
            "created_at": row.created_at,
            "thumbnail": f"/v1/datasets/{dataset_id}/images/{row.id}/thumbnail",
        }
        for row in rows
    ]
    return FastJSON(paging.out(items, more, lambda: rows[-1].id))


@router.get(
    "/{dataset_id}/images/{image_id}/thumbnail",
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {}}}, **documented(NotFound)},
)
def get_thumbnail(
    dataset_id: str, image_id: str, parts: PartsDep, side: Annotated[int, Query(ge=16, le=1024)] = 160
) -> Response:
    """A JPEG thumbnail whose longer side is `side` pixels."""
    with parts.database.read() as session:
        row = repositories.get(session, Image, image_id)
    if row.dataset_id != dataset_id:
        raise NotFound(f"There is no image {image_id!r} in dataset {dataset_id!r}.")
    data = make_thumbnail(parts.store.read_bytes(image_key(row.sha256)), side, parts.image_limits)
    headers = {"Cache-Control": "private, max-age=86400, immutable"}
    return Response(data, media_type="image/jpeg", headers=headers)
