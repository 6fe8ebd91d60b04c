"""Filling datasets: images, archives, feature files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from models.data.images import ImageInfo, probe_image
from models.errors import InvalidInput, UnreadableImage
from models.knowledge.names import normalize_class_name, validate_class_names
from service.core import jobs, repositories
from service.core.errors import Conflict, Invalid, NotFound, TooLarge, UnsupportedMedia
from service.core.ids import new_id
from service.core.tables import Dataset, Image
from service.deps import Parts, PartsDep
from service.json import FastJSON
from service.problems import documented
from service.schemas import (
    AcceptedImage,
    JobOut,
    RejectedImage,
    UploadOut,
)
from service.submit import JOB_HEADERS, submit
from service.uploads import file_fields, multipart, scratch_copy

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])
_ARCHIVE_TYPES = (
    "application/zip",
    "application/x-tar",
    "application/gzip",
    "application/x-gzip",
    "application/x-bzip2",
    "application/x-xz",
    "application/octet-stream",
    "application/x-zip-compressed",
)


@dataclass(frozen=True)
class _Labels:
    """Which class (and split) each file belongs to."""

    class_name: str | None
    by_filename: dict[str, str]
    split: str | None

    def of(self, filename: str) -> str | None:
        return self.by_filename.get(filename, self.class_name)


@router.post(
    "/{dataset_id}/images",
    response_model=UploadOut,
    responses=documented(NotFound, Conflict, TooLarge, UnsupportedMedia),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["files"],
                        "properties": {
                            "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                            "class_name": {"type": "string", "description": "The class of all files."},
                            "labels": {
                                "type": "string",
                                "description": "JSON object: file name -> class name; or list, in file order.",
                            },
                            "split": {"type": "string", "enum": ["train", "test"]},
                        },
                    }
                }
            },
        }
    },
)
async def upload_images(dataset_id: str, request: Request, parts: PartsDep) -> Response:
    """Adds labelled images. Unusable files are reported and skipped; the same content is accepted once."""
    await run_in_threadpool(_writable_dataset, parts, dataset_id)
    async with multipart(request, parts.settings) as form:
        files = file_fields(form, "files", "files[]", "file")
        if not files:
            raise Invalid("The form holds no files; send them in the field 'files'.")
        labels = _labels(form, files, parts)
        out = UploadOut(accepted=[], rejected=[])
        batch: list[tuple[str, str, str, ImageInfo, int]] = []
        for file in files:
            filename = (file.filename or "")[-512:]
            class_name = labels.of(filename)
            if class_name is None:
                raise Invalid(f"No class is given for {filename!r}: send 'class_name', or name the file in 'labels'.")
            if (file.size or 0) > parts.settings.max_image_bytes:
                reason = f"The file has {file.size:,} bytes; at most {parts.settings.max_image_bytes:,} are taken."
                out.rejected.append(RejectedImage(filename=filename, reason=reason))
                continue
            try:
                sha256, info, size = await run_in_threadpool(_store_image, parts, await file.read())
                batch.append((filename, class_name, sha256, info, size))
            except UnreadableImage as error:
                out.rejected.append(RejectedImage(filename=filename, reason=error.reason))
        await run_in_threadpool(_record_images, parts, dataset_id, labels.split, batch, out)
    return FastJSON(out.model_dump())


def _writable_dataset(parts: Parts, dataset_id: str) -> None:
    with parts.database.read() as session:
        if repositories.get(session, Dataset, dataset_id).kind != "images":
            raise Conflict(f"Dataset {dataset_id!r} holds features; it takes no images. Create another dataset.")


def _labels(form: FormData, files: list[UploadFile], parts: Parts) -> _Labels:
    class_name, split, raw = (
        value if isinstance(value, str) else None for value in map(form.get, ("class_name", "split", "labels"))
    )
    if split not in (None, "", "train", "test"):
        raise Invalid(f"'split' must be 'train' or 'test', not {split!r}; leave it out to follow test_fraction.")
    by_filename: dict[str, str] = {}
    if raw:
        by_filename = _parse_labels(raw, [(file.filename or "")[-512:] for file in files])
    names = [*([class_name] if class_name is not None else []), *dict.fromkeys(by_filename.values())]
    if not names:
        raise Invalid("Say which class the images show: 'class_name' for all files, or 'labels' for each.")
    validate_class_names(list(dict.fromkeys(names)), max_count=parts.settings.max_classes, field="labels")
    return _Labels(class_name, by_filename, split or None)


def _parse_labels(raw: str, filenames: list[str]) -> dict[str, str]:
    try:
        labels = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Invalid(f"'labels' is no valid JSON: {error}.") from None
    if isinstance(labels, list):
        if len(labels) != len(filenames):
            raise Invalid(f"'labels' lists {len(labels)} classes for {len(filenames)} files.")
        if len(set(filenames)) != len(filenames):
            raise Invalid("Two files share a name, so 'labels' as a list is ambiguous; name the files differently.")
        labels = dict(zip(filenames, labels, strict=True))
    if not isinstance(labels, dict) or not all(isinstance(v, str) for v in labels.values()):
        raise Invalid("'labels' must be a JSON object of file name -> class name, or a list of class names.")
    unknown = [name for name in labels if name not in set(filenames)]
    if unknown:
        raise Invalid(f"'labels' names {unknown[0]!r}, which is not among the uploaded files.")
    return labels


def _store_image(parts: Parts, data: bytes) -> tuple[str, ImageInfo, int]:
    info = probe_image(data, parts.image_limits)
    parts.store.put_bytes(data)
    return hashlib.sha256(data).hexdigest(), info, len(data)


def _record_images(
    parts: Parts, dataset_id: str, split: str | None, batch: list[tuple[str, str, str, ImageInfo, int]], out: UploadOut
) -> None:
    with parts.database.write() as session:
        repositories.get(session, Dataset, dataset_id)
        known = {
            normalize_class_name(c.class_name): c.class_name for c in repositories.class_counts(session, dataset_id)
        }
        present = repositories.images_by_content(session, dataset_id, [sha256 for _, _, sha256, _, _ in batch])
        for filename, class_name, sha256, info, size in batch:
            existing = known.setdefault(normalize_class_name(class_name), class_name)
            if existing != class_name:
                raise InvalidInput(
                    f"The class {class_name!r} exists already, spelled {existing!r}. Use that spelling.",
                    field="class_name",
                )
            row = present.get(sha256)
            if row is not None and row.class_name != class_name:
                reason = f"The same image is already in this dataset, as {row.class_name!r}."
                out.rejected.append(RejectedImage(filename=filename, reason=reason))
                continue
            duplicate = row is not None
            if row is None:
                row = Image(
                    id=new_id("image"),
                    dataset_id=dataset_id,
                    sha256=sha256,
                    class_name=class_name,
                    filename=filename,
                    width=info.width,
                    height=info.height,
                    size_bytes=size,
                    split=split,
                )
                session.add(row)
                present[sha256] = row
            out.accepted.append(
                AcceptedImage(
                    image_id=row.id,
                    sha256=sha256,
                    class_name=row.class_name,
                    filename=filename,
                    width=row.width,
                    height=row.height,
                    duplicate=duplicate,
                )
            )


@router.post(
    "/{dataset_id}/archive",
    status_code=202,
    response_model=JobOut,
    responses={202: {"headers": JOB_HEADERS}, **documented(NotFound, Conflict, TooLarge, UnsupportedMedia)},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/zip": {"schema": {"type": "string", "format": "binary"}},
                "application/x-tar": {"schema": {"type": "string", "format": "binary"}},
                "application/gzip": {"schema": {"type": "string", "format": "binary"}},
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["file"],
                        "properties": {"file": {"type": "string", "format": "binary"}},
                    }
                },
            },
        }
    },
)
async def upload_archive(dataset_id: str, request: Request, parts: PartsDep) -> Response:
    """Imports a zip or tar with one folder a class. The job's result reports every file."""
    await run_in_threadpool(_writable_dataset, parts, dataset_id)
    content_type = request.headers.get("content-type", "").split(";")[0].strip()
    if content_type == "multipart/form-data":
        async with multipart(request, parts.settings) as form:
            files = file_fields(form, "file", "files", "archive")
            if len(files) != 1:
                raise Invalid(f"Send exactly one archive in the field 'file' ({len(files)} found).")
            async with scratch_copy(files[0], parts.settings) as path:
                key = await run_in_threadpool(parts.store.put_file, path)
    elif content_type in _ARCHIVE_TYPES:
        async with scratch_copy(request, parts.settings) as path:
            key = await run_in_threadpool(parts.store.put_file, path)
    else:
        raise UnsupportedMedia(
            f"An archive is sent as application/zip, application/x-tar or application/gzip, not {content_type!r}."
        )
    return await run_in_threadpool(_submit_import, parts, dataset_id, "import_archive", {"archive": key})


@router.post(
    "/{dataset_id}/features",
    status_code=202,
    response_model=JobOut,
    responses={202: {"headers": JOB_HEADERS}, **documented(NotFound, Conflict, TooLarge, UnsupportedMedia)},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "description": "res101 and att_splits (xlsa17 .mat), or features (.npz), splits (.json).",
                        "properties": {
                            name: {"type": "string", "format": "binary"}
                            for name in ("res101", "att_splits", "features", "splits")
                        },
                    }
                }
            },
        }
    },
)
async def upload_features(dataset_id: str, request: Request, parts: PartsDep) -> Response:
    """Fills an empty dataset with precomputed features and their splits."""
    await run_in_threadpool(_empty_dataset, parts, dataset_id)
    keys: dict[str, str] = {}
    async with multipart(request, parts.settings) as form:
        for name in ("res101", "att_splits", "features", "splits"):
            for file in file_fields(form, name):
                async with scratch_copy(file, parts.settings) as path:
                    keys[name] = await run_in_threadpool(parts.store.put_file, path)
    if set(keys) not in ({"res101", "att_splits"}, {"features"}, {"features", "splits"}):
        raise Invalid(
            f"Send 'res101' and 'att_splits', or 'features' with optional 'splits'; found {sorted(keys) or 'no file'}."
        )
    return await run_in_threadpool(_submit_import, parts, dataset_id, "import_features", {"files": keys})


def _empty_dataset(parts: Parts, dataset_id: str) -> None:
    with parts.database.read() as session:
        row = repositories.get(session, Dataset, dataset_id)
        if row.kind == "features" or repositories.count_images(session, [dataset_id]):
            raise Conflict(f"Dataset {dataset_id!r} is not empty; create a new dataset for a feature file.")


def _submit_import(parts: Parts, dataset_id: str, kind: str, payload: dict[str, Any]) -> Response:
    with parts.database.write() as session:
        repositories.get(session, Dataset, dataset_id)
        job = jobs.create_job(session, kind, dataset_id, payload, parts.settings.max_attempts)
    return submit(parts, job)
