"""Turns every error into `application/problem+json` (RFC 9457), and documents it per route."""

from __future__ import annotations

from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException

from models.errors import ModelError
from service.core.errors import ERRORS, Invalid, Problem, ServiceError, Unavailable, problem_of
from service.json import dumps

MEDIA_TYPE = "application/problem+json"
log = structlog.get_logger("unseen.api")

PROBLEM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "title": "Problem",
    "description": "RFC 9457 problem details: what was wrong, where, and what to do.",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "examples": ["urn:unseen:problem:not-found"]},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "instance": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["pointer", "message"],
                "properties": {"pointer": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
}


def documented(*errors: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route that can raise these errors (401, 403, 503 and 422 are every route's)."""
    return {
        error.status: {
            "description": (error.__doc__ or error.title).strip(),
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for error in errors
    }


def problem_response(error: Exception, request_path: str) -> Response:
    """The answer for any error."""
    body = problem_of(error, instance=request_path)
    headers = {}
    if isinstance(error, ServiceError) and error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if body["status"] == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(dumps(body), status_code=body["status"], media_type=MEDIA_TYPE, headers=headers)


def pointer_of(location: tuple[Any, ...]) -> str:
    """pydantic's location as a JSON pointer; the leading 'body' / 'query' tells where and stays for non-bodies."""
    parts = [str(part) for part in location]
    if parts and parts[0] == "body":
        parts = parts[1:]
    return "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in parts)


def install(app: FastAPI) -> None:
    """Registers the handlers."""

    async def on_service_error(request: Request, error: Exception) -> Response:
        return problem_response(error, request.url.path)

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        problems = [Problem(pointer_of(tuple(e["loc"])), _sentence(e)) for e in error.errors()[:100]]
        first = problems[0] if problems else Problem("", "The request is malformed.")
        detail = f"{len(problems)} problem(s); the first, at {first.pointer or '/'}: {first.message}"
        return problem_response(Invalid(detail, problems=problems), request.url.path)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        wrapped = ServiceError(_http_detail(error, request))
        wrapped.status, wrapped.title = error.status_code, str(error.detail)
        wrapped.slug = str(error.detail).lower().replace(" ", "-")
        response = problem_response(wrapped, request.url.path)
        response.headers.update(error.headers or {})
        return response

    async def on_database(request: Request, error: Exception) -> Response:
        log.warning("database unavailable", error=str(error))
        detail = "The database cannot be reached or is busy. Nothing was changed; try again."
        return problem_response(Unavailable(detail, retry_after_s=2), request.url.path)

    async def on_disk(request: Request, error: Exception) -> Response:
        log.error("storage failed", error=str(error))
        detail = "The storage refused to write (is the disk full?). Nothing was accepted; try again later."
        return problem_response(Unavailable(detail, retry_after_s=30), request.url.path)

    async def on_unknown(request: Request, error: Exception) -> Response:
        log.exception("unhandled error", path=request.url.path, exc_info=error)
        return problem_response(error, request.url.path)

    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(ModelError, on_service_error)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(OperationalError, on_database)
    app.add_exception_handler(OSError, on_disk)
    app.add_exception_handler(Exception, on_unknown)


def document(schema: dict[str, Any]) -> None:
    """Puts the Problem schema into an OpenAPI document and makes every route's 4xx answers refer to it."""
    schemas = schema.setdefault("components", {}).setdefault("schemas", {})
    schemas["Problem"] = PROBLEM_SCHEMA
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    common = {str(error.status): error for error in ERRORS if error.status in (401, 403, 422, 503)}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            responses = operation.setdefault("responses", {})
            for status, error in common.items():
                if status == "422" or path.startswith("/v1"):
                    entry = documented(error)[int(status)]
                    if status == "422" and status not in responses and not path.startswith("/v1"):
                        continue
                    responses[status] = entry


def _sentence(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    given = error.get("input")
    if error["type"] == "extra_forbidden":
        return f"Unknown field {error['loc'][-1]!r}. {message}."
    if isinstance(given, str | int | float | bool) and error["type"] != "missing":
        shown = repr(given) if len(repr(given)) <= 80 else repr(given)[:77] + "..."
        return f"{message} (given: {shown})."
    return message if message.endswith(".") else message + "."


def _http_detail(error: HTTPException, request: Request) -> str:
    if error.status_code == 404:
        return f"There is no route {request.method} {request.url.path}. See /docs for all of them."
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return f"{request.url.path} does not take {request.method}." + (f" It takes {allowed}." if allowed else "")
    return str(error.detail)
