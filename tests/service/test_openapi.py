"""The OpenAPI document: committed, complete, its references resolve."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service.app import create_app
from service.core.settings import Settings
from service.openapi import document_bytes

ROOT = Path(__file__).resolve().parents[2]
LIVE = document_bytes(create_app(Settings(host="127.0.0.1", api_keys="")))
DOCUMENT: dict[str, Any] = json.loads(LIVE)


def walk(node: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """(path, key, value) of everything in the document."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield path, key, value
            yield from walk(value, f"{path}/{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from walk(value, f"{path}/{i}")


def test_the_committed_file_is_what_the_code_says() -> None:
    committed = (ROOT / "openapi" / "openapi.json").read_bytes()
    assert committed == LIVE, "run `make openapi` and commit openapi/openapi.json"


def test_every_reference_resolves() -> None:
    references = {value for _, key, value in walk(DOCUMENT) if key == "$ref"}
    assert "#/components/schemas/HuggingFaceParameters" in references
    for reference in references:
        node: Any = DOCUMENT
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]
        assert isinstance(node, dict)


def test_no_definitions_hide_where_nobody_finds_them() -> None:
    assert not [path for path, key, _ in walk(DOCUMENT) if key in ("$defs", "HTTPValidationError")]


def test_every_operation_is_described_and_named_once() -> None:
    operations = [o for path in DOCUMENT["paths"].values() for o in path.values()]
    assert all(operation["summary"] and operation["description"] for operation in operations)
    ids = [operation["operationId"] for operation in operations]
    assert len(set(ids)) == len(ids)


def test_answers_and_bodies_have_schemas() -> None:
    for path, operations in DOCUMENT["paths"].items():
        for method, operation in operations.items():
            for status, response in operation["responses"].items():
                for media, content in response.get("content", {}).items():
                    if media == "application/json" and path.startswith("/v1"):
                        assert content["schema"], (method, path, status)
            for media, content in operation.get("requestBody", {}).get("content", {}).items():
                assert content["schema"], (method, path, media)


def test_posts_take_an_idempotency_key_and_routes_a_bearer() -> None:
    for path, operations in DOCUMENT["paths"].items():
        for method, operation in operations.items():
            names = {parameter["name"] for parameter in operation.get("parameters", [])}
            is_v1_post = method == "post" and path.startswith("/v1")
            assert ("Idempotency-Key" in names) == is_v1_post, (method, path)
            assert ("security" in operation) == path.startswith("/v1")


def test_long_work_documents_where_to_look() -> None:
    made = [o for p in DOCUMENT["paths"].values() for o in p.values() if "202" in o["responses"]]
    assert len(made) >= 7
    for operation in made:
        if not operation["operationId"].startswith(("cancel", "retry")):
            assert {"Location", "Retry-After"} <= set(operation["responses"]["202"]["headers"])


def test_the_document_is_valid_openapi() -> None:
    """The parts of the specification that tools stumble over."""
    assert DOCUMENT["openapi"].startswith("3.1")
    for path, operations in DOCUMENT["paths"].items():
        declared = {part[1:-1] for part in path.split("/") if part.startswith("{")}
        for operation in operations.values():
            parameters = operation.get("parameters", [])
            assert {p["name"] for p in parameters if p["in"] == "path"} == declared
            assert len({(p["in"], p["name"]) for p in parameters}) == len(parameters)
            for status, response in operation["responses"].items():
                assert status.isdigit()
                assert response["description"]
