"""Turns every error into `application/problem+json` (RFC 9457)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, get_args

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from redis.exceptions import RedisError
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from models.errors import ModelError, nearest_names
from service.core.errors import (
    Conflict,
    Invalid,
    Problem,
    ServiceError,
    TooLarge,
    Unavailable,
    UnsupportedMedia,
    problem_of,
)
from service.json import dumps

MEDIA_TYPE = "application/problem+json"
MAX_PROBLEMS = 100
KNOWN: tuple[type[Exception], ...] = (
    ServiceError,
    ModelError,
    IntegrityError,
    OperationalError,
    InterfaceError,
    PoolTimeoutError,
    RedisError,
    OSError,
)
log = structlog.get_logger("unseen.api")


def documented(*errors: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route that can raise these errors; `service.openapi` adds those that every route has."""
    return {
        error.status: {
            "description": (error.__doc__ or error.title).strip(),
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for error in errors
    }


def problem_response(error: Exception, request_path: str) -> Response:
    """The answer for any error; what nobody expected is logged and keeps its text to itself."""
    error = known_error(error)
    if not isinstance(error, ServiceError | ModelError):
        log.error("unhandled error", path=request_path, exc_info=error)
    body = problem_of(error, instance=request_path)
    headers = {}
    if isinstance(error, ServiceError) and error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if body["status"] == 401:
        headers["WWW-Authenticate"] = "Bearer"
    try:
        content = dumps(body)
    except TypeError:  # quotes a caller's lone surrogates, which UTF-8 cannot carry
        content = json.dumps(body).encode("ascii")
    return Response(content, status_code=body["status"], media_type=MEDIA_TYPE, headers=headers)


def known_error(error: Exception) -> Exception:
    """Failures of database, Redis and disk as what they mean to the caller; any other error as it is."""
    if isinstance(error, IntegrityError):
        return Conflict("Another request changed the same thing at the same time. Look at it and try again.")
    if isinstance(error, OperationalError | InterfaceError | PoolTimeoutError):
        log.warning("database unavailable", error=str(error))
        return Unavailable(
            "The database cannot be reached or is busy. Nothing was changed; try again.", retry_after_s=2
        )
    if isinstance(error, RedisError):
        return Unavailable("Redis does not answer. Try again.", retry_after_s=2)
    if isinstance(error, OSError):
        log.error("storage failed", error=str(error))
        return Unavailable(
            "The storage refused to write (is the disk full?). Nothing was accepted; try again later.", retry_after_s=30
        )
    return error


# ---- validation -------------------------------------------------------------------------------


def pointer_of(location: Sequence[Any]) -> str:
    """pydantic's location as a JSON pointer; a leading 'body' goes, 'query' and 'path' stay and tell where."""
    parts = [str(part) for part in location]
    if parts and parts[0] == "body":
        parts = parts[1:]
    return "".join("/" + escape(part) for part in parts)


def escape(part: str) -> str:
    """One step of a JSON pointer (RFC 6901)."""
    return part.replace("~", "~0").replace("/", "~1")


def validation_problems(errors: Sequence[Any], model: Any = None, prefix: str = "") -> list[Problem]:
    """pydantic's errors as ours, at most 100; unknown fields of `model` get the nearest valid names."""
    return [
        Problem(prefix + ("" if e["type"] == "json_invalid" else pointer_of(e["loc"])), _sentence(e, model))
        for e in errors[:MAX_PROBLEMS]
    ]


def invalid(errors: Sequence[Any], model: Any = None) -> Invalid:
    """All of pydantic's errors as one refusal."""
    problems = validation_problems(errors, model)
    first = problems[0]
    count = f"{len(errors)} problems; the first, " if len(errors) > 1 else ""
    return Invalid(f"{count}at {first.pointer or '/'}: {first.message}", problems=problems)


def _sentence(error: Any, model: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    kind, given = error["type"], error.get("input")
    if kind == "json_invalid":
        where = f" at character {error['loc'][-1]}" if error["loc"] else ""
        return f"The body is no valid JSON: {error.get('ctx', {}).get('error', message)}{where}."
    if kind == "extra_forbidden":
        name = str(error["loc"][-1])
        valid = _fields_at(model, error["loc"])
        near = nearest_names(name, valid)
        hint = f"Did you mean {near[0]!r}?" if near else f"Valid: {', '.join(valid)}." if valid else "Remove it."
        return f"Unknown field {name!r}. {hint}"
    if kind == "missing":
        return "Send a JSON body." if tuple(error["loc"]) == ("body",) else "This field is required."
    if isinstance(given, str | int | float | bool):
        shown = repr(given) if len(repr(given)) <= 80 else repr(given)[:77] + "..."
        return f"{message} (given: {shown})."
    return message if message.endswith(".") else message + "."


def _fields_at(model: Any, location: Sequence[Any]) -> list[str]:
    """The fields that the (nested) model has in which `location` names an unknown one."""
    for part in [part for part in location if part != "body"][:-1]:
        if not _is_model(model) or part not in model.model_fields:
            return []
        annotation = model.model_fields[part].annotation
        model = next((kind for kind in (annotation, *get_args(annotation)) if _is_model(kind)), None)
    return list(model.model_fields) if _is_model(model) else []


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


# ---- handlers ---------------------------------------------------------------------------------


def install(app: FastAPI) -> None:
    """Registers the handlers. Errors that none of them takes are answered by `middleware.Gate`."""

    async def on_known(request: Request, error: Exception) -> Response:
        return problem_response(error, request.url.path)

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return problem_response(_of_request(request, error.errors()), request.url.path)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:  # the framework names the methods of one route alone
            error = HTTPException(405, error.detail, {"Allow": ", ".join(_methods_taken(request))})
        response = problem_response(_of_http(request, error), request.url.path)
        response.headers.update(error.headers or {})
        return response

    for kind in KNOWN:
        app.add_exception_handler(kind, on_known)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)


def _methods_taken(request: Request) -> list[str]:
    """By all routes of the request's path together."""
    return [
        method
        for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]


def _of_request(request: Request, errors: Sequence[Any]) -> ServiceError:
    content_type = request.headers.get("content-type", "")
    is_whole_body = any(tuple(e["loc"]) == ("body",) and e["type"] != "missing" for e in errors)
    if is_whole_body and "json" not in content_type.lower():
        return UnsupportedMedia(f"Send this body as application/json, not {content_type or 'without Content-Type'!r}.")
    body = getattr(request.scope.get("route"), "body_field", None)
    return invalid(errors, body.field_info.annotation if body is not None else None)


def _of_http(request: Request, error: HTTPException) -> Exception:
    """The framework's own errors. It wraps what goes wrong while a JSON body is read; the cause tells more."""
    cause = error.__cause__
    if isinstance(cause, ServiceError | OSError):
        return cause
    if error.status_code == 400:
        return Invalid(f"The body cannot be read ({type(cause).__name__}). Send valid JSON in UTF-8, nested less deep.")
    if error.status_code == 413:
        return TooLarge(str(error.detail))
    wrapped = ServiceError(_http_detail(error, request))
    wrapped.status, wrapped.title = error.status_code, str(error.detail)
    wrapped.slug = str(error.detail).lower().replace(" ", "-")
    return wrapped


def _http_detail(error: HTTPException, request: Request) -> str:
    if error.status_code == 404:
        return f"There is no route {request.method} {request.url.path}. See /docs for all of them."
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return f"{request.url.path} does not take {request.method}." + (f" It takes {allowed}." if allowed else "")
    return str(error.detail)
