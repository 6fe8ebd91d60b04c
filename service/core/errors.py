"""Every error a caller can meet, and the one table that gives each its HTTP status.

ServiceError
├── NotFound               no such resource
├── Conflict               the request contradicts the state (in use, wrong status, key in flight)
├── Invalid                the request cannot be fulfilled as written; lists every problem found
├── TooLarge               past a stated limit
├── UnsupportedMedia       a content type or file format this route does not read
├── Unauthorized           no valid API key
├── Forbidden              the key lacks the scope
├── RateLimited            too many requests for this key
├── TooSlow                the body did not arrive in time
├── TooLate                the time given for the answer was over
├── Unavailable            Redis, database, store or inference process cannot answer now; try again
└── WorkerLost             a job's worker died every time it was tried

`models.errors` map onto the same statuses (see `problem_of`), so workers and routes tell one story.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from models import errors as model_errors


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: a JSON pointer into the request body ('' for all of it) and a sentence."""

    pointer: str
    message: str


class ServiceError(Exception):
    """Base; `detail` is a sentence that tells the caller what to do."""

    status = 500
    title = "Internal error"
    slug = "internal"

    def __init__(self, detail: str, *, problems: Sequence[Problem] = (), retry_after_s: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.problems = list(problems)
        self.retry_after_s = retry_after_s


class NotFound(ServiceError):
    """No such resource."""

    status, title, slug = 404, "Not found", "not-found"


class Conflict(ServiceError):
    """The request contradicts the current state."""

    status, title, slug = 409, "Conflict", "conflict"


class Invalid(ServiceError):
    """The request cannot be fulfilled as written."""

    status, title, slug = 422, "Invalid request", "invalid"


class TooLarge(ServiceError):
    """Past a stated limit."""

    status, title, slug = 413, "Too large", "too-large"


class UnsupportedMedia(ServiceError):
    """A content type or file format that this route does not read."""

    status, title, slug = 415, "Unsupported media type", "unsupported-media-type"


class Unauthorized(ServiceError):
    """No valid API key."""

    status, title, slug = 401, "Unauthorized", "unauthorized"


class Forbidden(ServiceError):
    """The API key lacks the scope."""

    status, title, slug = 403, "Forbidden", "forbidden"


class RateLimited(ServiceError):
    """Too many requests for this key."""

    status, title, slug = 429, "Too many requests", "rate-limited"


class TooSlow(ServiceError):
    """The request's body did not arrive in time."""

    status, title, slug = 408, "Request timeout", "request-timeout"


class TooLate(ServiceError):
    """The time given for the answer was over before it was there."""

    status, title, slug = 504, "Deadline exceeded", "deadline-exceeded"


class Unavailable(ServiceError):
    """A part that is needed cannot answer now."""

    status, title, slug = 503, "Temporarily unavailable", "unavailable"


class WorkerLost(ServiceError):
    """A job's worker died every time it was tried."""

    status, title, slug = 500, "Worker lost", "worker-lost"


ERRORS: tuple[type[ServiceError], ...] = (
    NotFound,
    Conflict,
    Invalid,
    TooLarge,
    UnsupportedMedia,
    Unauthorized,
    Forbidden,
    RateLimited,
    TooSlow,
    TooLate,
    Unavailable,
    WorkerLost,
)


def problem_of(error: Exception, *, instance: str | None = None) -> dict[str, Any]:
    """The RFC 9457 object of any error; unknown ones keep their text out of the answer."""
    if isinstance(error, model_errors.InvalidInput):
        pointer = "/" + error.field if error.field else ""
        error = Invalid(str(error), problems=[Problem(pointer, str(error))])
    elif isinstance(error, model_errors.ModelError):
        error = Invalid(str(error) or type(error).__name__)
    if not isinstance(error, ServiceError):
        error = ServiceError("Something went wrong here, not in your request. The log holds the details.")
    body: dict[str, Any] = {
        "type": f"urn:unseen:problem:{error.slug}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
    }
    if instance is not None:
        body["instance"] = instance
    if error.problems:
        body["errors"] = [{"pointer": p.pointer, "message": p.message} for p in error.problems]
    return body
