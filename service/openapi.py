"""The OpenAPI document: what FastAPI derives from the routes, and what every route has in common.

`make openapi` writes it to openapi/openapi.json.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from service.core.errors import (
    Conflict,
    Forbidden,
    Invalid,
    RateLimited,
    ServiceError,
    TooLarge,
    TooSlow,
    Unauthorized,
    Unavailable,
    UnsupportedMedia,
)
from service.problems import documented

if TYPE_CHECKING:
    from fastapi import FastAPI

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
IDEMPOTENCY_KEY: dict[str, Any] = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Same key and body, same answer; another body, 422; still in flight, 409.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 200},
}
# An answer that any v1 route can give; the second row, any POST.
EVERY_ROUTE: tuple[type[ServiceError], ...] = (Unauthorized, Forbidden, Invalid, RateLimited, Unavailable)
EVERY_POST: tuple[type[ServiceError], ...] = (Conflict, TooSlow, TooLarge)


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """The document of the app. Made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version="v1", description=app.description, routes=app.routes)
        components = document.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        schemas["Problem"] = PROBLEM_SCHEMA
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        components["securitySchemes"] = {"ApiKey": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                _complete(operation, is_v1=path.startswith("/v1"), is_post=method == "post")
        _lift_definitions(document, schemas)
        app.openapi_schema = document
    return app.openapi_schema


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The schema of a body that a route reads by itself, for `openapi_extra`."""
    return model.model_json_schema(ref_template="#/components/schemas/{model}")


def _complete(operation: dict[str, Any], *, is_v1: bool, is_post: bool) -> None:
    responses = operation.setdefault("responses", {})
    responses.pop("422", None)  # FastAPI's own shape
    if not is_v1:
        return
    operation["security"] = [{"ApiKey": []}, {}]
    common = [*EVERY_ROUTE, *(EVERY_POST if is_post else ())]
    if "application/json" in operation.get("requestBody", {}).get("content", {}):
        common.append(UnsupportedMedia)
    if is_post:
        operation.setdefault("parameters", []).append(IDEMPOTENCY_KEY)
    for error in common:
        responses.update({str(status): entry for status, entry in documented(error).items()})
    operation["responses"] = dict(sorted(responses.items()))


def _lift_definitions(node: Any, schemas: dict[str, Any]) -> None:
    """Moves `$defs` of hand-written bodies to where their references point."""
    if isinstance(node, dict):
        for name, schema in node.pop("$defs", {}).items():
            schemas.setdefault(name, schema)
    for child in list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else ():
        _lift_definitions(child, schemas)


def document_bytes(app: FastAPI) -> bytes:
    """The committed file's content: sorted, indented, one final newline."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
    return orjson.dumps(openapi_document(app), option=options)
