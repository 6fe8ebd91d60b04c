"""Files that arrive over HTTP: streamed to the scratch folder, gone again unless they are put into the store."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException

from service.core.errors import Invalid, TooLarge, UnsupportedMedia
from service.core.settings import Settings

_COPY_BYTES = 2**20


@asynccontextmanager
async def multipart(request: Request, settings: Settings) -> AsyncIterator[FormData]:
    """The parsed multipart form, its files closed afterwards; clear errors for anything else."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise UnsupportedMedia("Send this request as multipart/form-data.")
    try:
        async with request.form(
            max_files=settings.max_files_per_request, max_fields=1000, max_part_size=settings.max_json_bytes
        ) as form:
            yield form
    except MultiPartException as error:
        if "Too many" in error.message:
            limit = settings.max_files_per_request
            raise TooLarge(f"{error.message} At most {limit} files and 1000 fields a request; send several.") from None
        raise Invalid(f"The multipart body is malformed: {error.message}") from None


def text_field(form: FormData, name: str, default: str | None = None) -> str:
    """A text field of the form; Invalid when it is missing and has no default."""
    value = form.get(name, default)
    if not isinstance(value, str):
        raise Invalid(f"The form lacks the text field {name!r}.")
    return value


def file_fields(form: FormData, *names: str) -> list[UploadFile]:
    """All files under any of these field names, in order."""
    return [value for key, value in form.multi_items() if key in names and isinstance(value, UploadFile)]


@asynccontextmanager
async def scratch_copy(source: UploadFile | Request, settings: Settings, suffix: str = "") -> AsyncIterator[Path]:
    """The upload as a file in the scratch folder, deleted on leaving."""
    settings.scratch_dir.mkdir(parents=True, exist_ok=True)
    path = settings.scratch_dir / f"upload-{secrets.token_hex(12)}{suffix}"
    try:
        with path.open("wb") as target:
            if isinstance(source, Request):
                async for chunk in source.stream():
                    await run_in_threadpool(target.write, chunk)
            else:
                while chunk := await source.read(_COPY_BYTES):
                    await run_in_threadpool(target.write, chunk)
        if os.path.getsize(path) == 0:
            raise Invalid("The uploaded file is empty.")
        yield path
    finally:
        path.unlink(missing_ok=True)
