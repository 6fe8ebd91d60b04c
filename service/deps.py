"""What routes ask for: the parts that `create_app` wired, and small shared helpers."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import redis
from fastapi import Depends, Query, Request

from models.data.images import ImageLimits
from service.core.artifacts import ArtifactStore
from service.core.db import Database
from service.core.errors import Invalid
from service.core.queue import JobQueue
from service.core.settings import Settings
from service.inference_client import InferenceClient


@dataclass
class Parts:
    """Everything a route may need, made once by `create_app`."""

    settings: Settings
    database: Database
    store: ArtifactStore
    redis: redis.Redis
    queue: JobQueue
    inference: InferenceClient

    @property
    def image_limits(self) -> ImageLimits:
        """Limits of a single image."""
        return ImageLimits(max_bytes=self.settings.max_image_bytes, max_pixels=self.settings.max_image_pixels)


def get_parts(request: Request) -> Parts:
    """The app's parts."""
    parts: Parts = request.app.state.parts
    return parts


PartsDep = Annotated[Parts, Depends(get_parts)]
Limit = Annotated[int, Query(ge=1, le=100, description="Items of one page.")]
Cursor = Annotated[str | None, Query(max_length=200, description="`next_cursor` of the page before.")]


def decode_cursor(cursor: str | None) -> str | None:
    """The key behind an opaque cursor; Invalid if it is not one of ours."""
    if cursor is None:
        return None
    try:
        return base64.urlsafe_b64decode(cursor.encode("ascii")).decode("utf-8")
    except (binascii.Error, UnicodeError):
        raise Invalid("`cursor` is not one that this service gave out; pass `next_cursor` unchanged.") from None


def page_out(items: Sequence[Any], has_more: bool, key: Callable[[], str]) -> dict[str, Any]:
    """The list answer: data, has_more, next_cursor."""
    cursor = base64.urlsafe_b64encode(key().encode("utf-8")).decode("ascii") if has_more else None
    return {"data": list(items), "has_more": has_more, "next_cursor": cursor}
