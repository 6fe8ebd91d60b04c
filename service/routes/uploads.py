"""Filling datasets: images, archives, feature files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from sqlalchemy.orm import Session
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
from service.uploads import content_type_of, file_fields, filename_of, multipart, scratch_copy, text_field

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])
_FEATURE_FILES = ("res101", "att_splits", "features", "splits")
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
class _Upload:
    """One usable image of a request, not yet stored."""

    file: UploadFile
    filename: str
    class_name: str
    sha256: str
    info: ImageInfo
    n_bytes: int


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
        classes = _classes(form, files, parts)
        split = _split(form)
        await run_in_threadpool(_check_spelling, parts, dataset_id, classes)
        out = UploadOut(accepted=[], rejected=[])
        batch: list[_Upload] = []
        for file, class_name in zip(files, classes, strict=True):
            try:
                batch.append(await run_in_threadpool(_probed, file, class_name, parts))
            except UnreadableImage as error:
                out.rejected.append(RejectedImage(filename=filename_of(file), reason=error.reason))
        await run_in_threadpool(_store, batch, parts)
        await run_in_threadpool(_record_images, parts, dataset_id, split, batch, out)
    return FastJSON(out.model_dump())


def _writable_dataset(parts: Parts, dataset_id: str) -> None:
    with parts.database.read() as session:
        if repositories.get(session, Dataset, dataset_id).kind != "images":
            raise Conflict(f"Dataset {dataset_id!r} holds features; it takes no images. Create another dataset.")


def _split(form: FormData) -> str | None:
    split = text_field(form, "split", "")
    if split not in ("", "train", "test"):
        raise Invalid(f"'split' must be 'train' or 'test', not {split!r}; leave it out to follow test_fraction.")
    return split or None


def _classes(form: FormData, files: list[UploadFile], parts: Parts) -> list[str]:
    """The class of each file, from `labels` or else `class_name`."""
    for_all = text_field(form, "class_name", "") if "class_name" in form else None
    raw = text_field(form, "labels", "")
    if for_all is None and not raw:
        raise Invalid("Say which class the images show: 'class_name' for all files, or 'labels' for each.")
    given: list[str | None] = [for_all] * len(files)
    if raw:
        labels = _parsed_labels(raw, [filename_of(file) for file in files])
        given = [label if label is not None else for_all for label in labels]
    if None in given:
        nameless = filename_of(files[given.index(None)])
        raise Invalid(f"No class is given for {nameless!r}: send 'class_name', or name the file in 'labels'.")
    field = "labels" if raw else "class_name"
    distinct = list(dict.fromkeys(name for name in given if name is not None))
    clean = validate_class_names(distinct, max_count=parts.settings.max_classes, field=field)
    cleaned = dict(zip(distinct, clean, strict=True))
    return [cleaned[name] for name in given if name is not None]


def _parsed_labels(raw: str, filenames: list[str]) -> list[str | None]:
    """The label of each file, None where `labels` does not name it."""
    try:
        labels = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Invalid(f"'labels' is no valid JSON: {error}.") from None
    is_list = isinstance(labels, list)
    values = labels if is_list else labels.values() if isinstance(labels, dict) else [None]
    if not all(isinstance(value, str) for value in values):
        raise Invalid("'labels' must be a JSON object of file name -> class name, or a list of class names.")
    if is_list:
        if len(labels) != len(filenames):
            raise Invalid(f"'labels' lists {len(labels)} classes for {len(filenames)} files; give one for each.")
        return list(labels)
    known = set(filenames)
    unknown = [name for name in labels if name not in known]
    if unknown:
        raise Invalid(f"'labels' names {unknown[0]!r}, which is not among the uploaded files.")
    twice = next((name for name in labels if filenames.count(name) > 1), None)
    if twice is not None:
        raise Invalid(f"Two files are called {twice!r}; name them differently, or send 'labels' as a list.")
    return [labels.get(name) for name in filenames]


def _check_spelling(parts: Parts, dataset_id: str, classes: Sequence[str]) -> None:
    with parts.database.read() as session:
        known = _spelling(session, dataset_id)
    for name in dict.fromkeys(classes):
        _require_spelling(known, name)


def _spelling(session: Session, dataset_id: str) -> dict[str, str]:
    """normalised name -> the dataset's spelling."""
    return {normalize_class_name(c.class_name): c.class_name for c in repositories.class_counts(session, dataset_id)}


def _require_spelling(known: dict[str, str], class_name: str) -> None:
    existing = known.setdefault(normalize_class_name(class_name), class_name)
    if existing != class_name:
        raise InvalidInput(
            f"The class {class_name!r} exists already, spelled {existing!r}. Use that spelling.", field="class_name"
        )


def _probed(file: UploadFile, class_name: str, parts: Parts) -> _Upload:
    """The file as an image, decoded once; UnreadableImage if it is none."""
    if (file.size or 0) > parts.settings.max_image_bytes:
        raise UnreadableImage(
            f"The file has {file.size:,} bytes; at most {parts.settings.max_image_bytes:,} are taken."
        )
    data = file.file.read()
    info = probe_image(data, parts.image_limits)
    return _Upload(file, filename_of(file), class_name, hashlib.sha256(data).hexdigest(), info, len(data))


def _store(batch: Sequence[_Upload], parts: Parts) -> None:
    with parts.store.batch() as put:
        for upload in batch:
            upload.file.file.seek(0)
            put(upload.file.file.read())


def _record_images(parts: Parts, dataset_id: str, split: str | None, batch: Sequence[_Upload], out: UploadOut) -> None:
    with parts.database.write() as session:
        repositories.get(session, Dataset, dataset_id)
        known = _spelling(session, dataset_id)
        present = repositories.images_by_content(session, dataset_id, [upload.sha256 for upload in batch])
        for upload in batch:
            _require_spelling(known, upload.class_name)
            row = present.get(upload.sha256)
            if row is not None and row.class_name != upload.class_name:
                reason = f"The same image is already in this dataset, as {row.class_name!r}."
                out.rejected.append(RejectedImage(filename=upload.filename, reason=reason))
                continue
            is_duplicate = row is not None
            if row is None:
                row = present[upload.sha256] = _image_row(dataset_id, upload, split)
                session.add(row)
            out.accepted.append(
                AcceptedImage(
                    image_id=row.id,
                    sha256=row.sha256,
                    class_name=row.class_name,
                    filename=upload.filename,
                    width=row.width,
                    height=row.height,
                    duplicate=is_duplicate,
                )
            )


def _image_row(dataset_id: str, upload: _Upload, split: str | None) -> Image:
    return Image(
        id=new_id("image"),
        dataset_id=dataset_id,
        sha256=upload.sha256,
        class_name=upload.class_name,
        filename=upload.filename,
        width=upload.info.width,
        height=upload.info.height,
        size_bytes=upload.n_bytes,
        split=split,
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
    content_type = content_type_of(request)
    if content_type == "multipart/form-data":
        async with multipart(request, parts.settings) as form:
            files = file_fields(form, "file", "files", "archive")
            if len(files) != 1:
                raise Invalid(f"Send exactly one archive in the field 'file' ({len(files)} found).")
            async with scratch_copy(files[0], parts.settings) as path:
                key = await run_in_threadpool(parts.store.put_file, path, move=True)
    elif content_type in _ARCHIVE_TYPES:
        async with scratch_copy(request, parts.settings) as path:
            key = await run_in_threadpool(parts.store.put_file, path, move=True)
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
                        "properties": {name: {"type": "string", "format": "binary"} for name in _FEATURE_FILES},
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
        files = {name: file_fields(form, name) for name in _FEATURE_FILES}
        given = {name: found[0] for name, found in files.items() if found}
        if set(given) not in ({"res101", "att_splits"}, {"features"}, {"features", "splits"}):
            found = ", ".join(given) or "no file"
            raise Invalid(f"Send 'res101' and 'att_splits', or 'features' with optional 'splits'; found: {found}.")
        twice = next((name for name, found in files.items() if len(found) > 1), None)
        if twice is not None:
            raise Invalid(f"Send one file in the field {twice!r}, not {len(files[twice])}.")
        for name, file in given.items():
            async with scratch_copy(file, parts.settings) as path:
                keys[name] = await run_in_threadpool(parts.store.put_file, path, move=True)
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
