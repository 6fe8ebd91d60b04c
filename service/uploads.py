"""Files that arrive over HTTP: streamed to the scratch folder, gone again unless they are put into the store."""

from __future__ import annotations

import fcntl
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import BinaryIO, cast

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import Message, Receive

from service.core.errors import Invalid, TooLarge, UnsupportedMedia
from service.core.settings import Settings

MAX_FIELDS = 1000
# Others may fail on some bytes, or give what UTF-8 cannot carry.
_CHARSETS = ("utf-8", "utf8", "us-ascii", "iso-8859-1")
_COPY_BYTES = 2**20
_EPILOGUE_BYTES = 1024  # what may follow the closing boundary


@asynccontextmanager
async def multipart(request: Request, settings: Settings) -> AsyncIterator[FormData]:
    """The parsed multipart form, its files closed afterwards; clear errors for anything else."""
    if content_type_of(request) != "multipart/form-data":
        raise UnsupportedMedia("Send this request as multipart/form-data.")
    _, options = parse_options_header(request.headers["content-type"])
    charset = options.get(b"charset", b"utf-8").decode("latin-1").lower()
    if charset not in _CHARSETS:
        raise UnsupportedMedia(f"Send the form's text in UTF-8, not in {charset!r}.")
    whole = Request(request.scope, _whole(request.receive, options.get(b"boundary", b"")))
    try:
        async with aclosing(whole.stream()) as stream:
            form = await _Form(request.headers, stream, settings).parse()
    except MultiPartException as error:
        if "Too many" in error.message:
            raise TooLarge(
                f"{error.message} One request takes at most {settings.max_files_per_request} files and {MAX_FIELDS} "
                "fields; send several."
            ) from None
        raise Invalid(f"The multipart body is malformed: {error.message} Send it whole, with its boundary.") from None
    try:
        yield form
    finally:
        await form.close()


class _Form(MultiPartParser):
    """Keeps large files in the scratch folder, nameless, so that they end with the process. The system's folder for
    temporary files, where they would lie otherwise, may be small, or memory.

    Text fields lie in memory, so what they hold together is limited."""

    def __init__(self, headers: Headers, stream: AsyncGenerator[bytes], settings: Settings) -> None:
        super().__init__(
            headers,
            stream,
            max_files=settings.max_files_per_request,
            max_fields=MAX_FIELDS,
            max_part_size=settings.max_json_bytes,
        )
        self._folder = settings.scratch_dir
        self._n_text_bytes = 0

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._current_part.file is None:
            self._n_text_bytes += end - start
            if self._n_text_bytes > self.max_part_size:
                raise TooLarge(f"The form's text fields hold more than {self.max_part_size:,} bytes together.")
        super().on_part_data(data, start, end)

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        upload = self._current_part.file
        if upload is not None:
            upload.file.close()
            spool = SpooledTemporaryFile(max_size=self.spool_max_size, dir=str(self._folder))  # noqa: SIM115 - the form's
            self._files_to_close_on_error.append(spool)
            upload.file = cast(BinaryIO, spool)


def _whole(receive: Receive, boundary: bytes) -> Receive:
    """`receive` that refuses a form without its closing boundary, whose last file the parser would drop in silence."""
    closing = b"--" + boundary + b"--"
    tail = b""

    async def watched() -> Message:
        nonlocal tail
        message = await receive()
        if message["type"] == "http.request":
            tail = (tail + message.get("body", b""))[-len(closing) - _EPILOGUE_BYTES :]
            if not message.get("more_body", False) and boundary and closing not in tail:
                raise Invalid("The multipart body is malformed: it ends before its closing boundary. Send it whole.")
        return message

    return watched


def content_type_of(request: Request) -> str:
    """The body's media type without parameters, in lower case; '' if there is none."""
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def text_field(form: FormData, name: str, default: str | None = None) -> str:
    """A text field of the form; Invalid when it is missing and has no default."""
    value = form.get(name, default)
    if not isinstance(value, str):
        raise Invalid(f"The form lacks the text field {name!r}.")
    return value


def file_fields(form: FormData, *names: str) -> list[UploadFile]:
    """All files under any of these field names, in order."""
    return [value for key, value in form.multi_items() if key in names and isinstance(value, UploadFile)]


def filename_of(file: UploadFile, max_length: int = 512) -> str:
    """The file's name as sent, without what cannot be printed or stored."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in file.filename or "")[-max_length:]


@asynccontextmanager
async def scratch_copy(source: UploadFile | Request, settings: Settings) -> AsyncIterator[Path]:
    """The upload as a file in the scratch folder, deleted on leaving."""
    settings.scratch_dir.mkdir(parents=True, exist_ok=True)
    path = settings.scratch_dir / f"upload-{secrets.token_hex(12)}"
    n_bytes = 0
    try:
        with path.open("wb") as target:
            fcntl.flock(target, fcntl.LOCK_EX)  # until it is closed; one without a lock was abandoned
            if isinstance(source, Request):
                async for chunk in source.stream():
                    n_bytes += await run_in_threadpool(target.write, chunk)
            else:
                while chunk := await source.read(_COPY_BYTES):
                    n_bytes += await run_in_threadpool(target.write, chunk)
            if n_bytes == 0:
                raise Invalid("The uploaded file is empty (0 bytes). Send its content.")
            await run_in_threadpool(target.flush)
            yield path
    finally:
        path.unlink(missing_ok=True)
