"""What routes ask for: the parts that `create_app` wired, and small shared helpers."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Query, Request
from redis import Redis

from models.data.images import ImageLimits
from service.core.artifacts import ArtifactStore
from service.core.db import Database
from service.core.errors import Invalid, Problem
from service.core.queue import JobQueue
from service.core.settings import Settings
from service.fanout import Fanout
from service.inference_client import InferenceClient


@dataclass
class Parts:
    """Everything a route may need, made once by `create_app`."""

    settings: Settings
    database: Database
    store: ArtifactStore
    redis: Redis
    queue: JobQueue
    inference: InferenceClient
    fanout: Fanout

    @property
    def image_limits(self) -> ImageLimits:
        """Limits of a single image."""
        return ImageLimits(max_bytes=self.settings.max_image_bytes, max_pixels=self.settings.max_image_pixels)


async def get_parts(request: Request) -> Parts:
    """The app's parts."""
    parts: Parts = request.app.state.parts
    return parts


PartsDep = Annotated[Parts, Depends(get_parts)]


@dataclass(frozen=True)
class Paging:
    """Which page of a list is asked for. A cursor is bound to its list: one from elsewhere is refused."""

    path: str
    limit: int
    after: str | None

    @property
    def position(self) -> int:
        """Where the page before ended, in lists whose items are counted from 0; -1 for the first page."""
        if self.after is None:
            return -1
        if not re.fullmatch("[0-9]{1,9}", self.after):
            raise _not_given_out()
        return int(self.after)

    def out(self, items: Sequence[Any], has_more: bool, key: Callable[[], str]) -> dict[str, Any]:
        """The list answer: data, has_more, next_cursor. `key` tells the last item's; it is asked if more follow."""
        cursor = None
        if has_more:
            cursor = base64.urlsafe_b64encode(f"{self.path}\n{key()}".encode()).decode("ascii")
        return {"data": list(items), "has_more": has_more, "next_cursor": cursor}


def _paging(default: int) -> Callable[..., Awaitable[Paging]]:
    async def get_paging(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100, description="Items of one page.")] = default,
        cursor: Annotated[str | None, Query(max_length=2000, description="`next_cursor` of the page before.")] = None,
    ) -> Paging:
        path = request.url.path
        return Paging(path, limit, None if cursor is None else _decoded(cursor, path))

    return get_paging


PagingDep = Annotated[Paging, Depends(_paging(20))]
LongPagingDep = Annotated[Paging, Depends(_paging(100))]


def _decoded(cursor: str, path: str) -> str:
    try:
        of_path, _, key = base64.urlsafe_b64decode(cursor.encode("ascii")).decode("utf-8").partition("\n")
    except (binascii.Error, UnicodeError):
        of_path, key = "", ""
    if of_path != path or not key or "\0" in key:
        raise _not_given_out()
    return key


def _not_given_out() -> Invalid:
    message = "`cursor` is not one that this list gave out; pass its `next_cursor` unchanged."
    return Invalid(message, problems=[Problem("/query/cursor", message)])
