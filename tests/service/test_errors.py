"""One error shape on every route; request ids; what the framework itself refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest

from service.app import create_app
from service.core.settings import Settings
from tests.service.harness import LiveApi, problem

DOCUMENT: dict[str, Any] = create_app(Settings(host="127.0.0.1", api_keys="")).openapi()
OPERATIONS = [
    (method.upper(), path, operation)
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
]
V1 = [entry for entry in OPERATIONS if entry[1].startswith("/v1")]
IDS = [f"{method} {path}" for method, path, _ in V1]


@pytest.mark.parametrize(("method", "path", "operation"), V1, ids=IDS)
def test_a_nonsense_request_has_the_one_error_shape(
    live_api: LiveApi, method: str, path: str, operation: dict[str, Any]
) -> None:
    url = re.sub(r"\{[a-z_]+\}", "no-such-id", path)
    bodies: list[dict[str, Any]] = [{}]
    if method == "POST":
        bodies = [{"json": []}, {"json": {"nonsense": 1}}, {"content": b"{", "headers": {"content-type": "text/plain"}}]
        bodies += [
            {"files": {"nonsense": ("a", b"x")}},
            {"content": b"\xff", "headers": {"content-type": "application/json"}},
        ]
    if method in ("GET", "DELETE") and "{" not in path:
        url += "?limit=x"
    for body in bodies:
        response = live_api.client.request(method, url, **body)
        if path == "/v1/methods":
            continue  # takes anything
        assert str(response.status_code) in operation["responses"], (response.status_code, response.text)
        problem(response, response.status_code)


@pytest.mark.parametrize(("method", "path", "operation"), V1, ids=IDS)
def test_every_route_documents_its_errors(method: str, path: str, operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    expected = {"401", "403", "422", "503"} | ({"404"} if "{" in path else set())
    expected |= {"408", "409", "413"} if method == "POST" else set()
    assert expected <= set(responses)
    for status, response in responses.items():
        if status.startswith(("4", "5")):
            assert response["content"] == {
                "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
            }
            assert response["description"]


def test_routes_and_methods_that_are_not_there(live_api: LiveApi) -> None:
    problem(live_api.client.get("/v1/nothing"), 404, "no route GET /v1/nothing", "/docs")
    response = live_api.client.put("/v1/datasets")
    problem(response, 405, "does not take PUT. It takes GET, POST.")
    assert response.headers["allow"] == "GET, POST"
    assert live_api.client.patch("/v1/datasets/x").headers["allow"] == "DELETE, GET"
    assert live_api.client.put("/openapi.json").headers["allow"] == "GET, HEAD"
    problem(live_api.client.get("/v1/datasets/a%00b"), 422, "NUL")
    problem(live_api.client.get("/v1/datasets/x/images?class_name=%00"), 422, "NUL")
    problem(live_api.client.get("/v1/methods/sjee"), 404, "Did you mean 'sje'?")


def test_a_field_that_is_missing_is_no_missing_body(live_api: LiveApi) -> None:
    answer = problem(live_api.client.post("/v1/knowledge", json={"vectors": {"cat": [1.0]}}), 422)
    assert answer["errors"] == [{"pointer": "/name", "message": "This field is required."}]
    problem(live_api.client.post("/v1/datasets"), 422, "Send a JSON body.")


def test_request_ids_are_echoed_or_made(live_api: LiveApi) -> None:
    assert live_api.client.get("/healthz", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = [live_api.client.get("/healthz", headers=h).headers["x-request-id"] for h in ({}, {"X-Request-Id": "a b"})]
    assert all(re.fullmatch(r"[0-9a-f]{16}", request_id) for request_id in made)
    assert live_api.client.get("/v1/nothing", headers={"X-Request-Id": "abc-2"}).headers["x-request-id"] == "abc-2"


def test_an_unforeseen_error_keeps_its_text(live_api: LiveApi, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any, **_options: Any) -> Any:
        raise RuntimeError("password=hunter2")

    monkeypatch.setattr("service.routes.datasets.repositories.page", broken)
    response = live_api.client.get("/v1/datasets", headers={"X-Request-Id": "abc-3"})
    assert "hunter2" not in str(problem(response, 500, "not in your request"))
    assert response.headers["x-request-id"] == "abc-3"


def test_health_version_and_readiness(live_api: LiveApi) -> None:
    assert live_api.client.get("/healthz").json() == {"status": "ok"}
    assert live_api.client.get("/version").json()["api"] == "v1"
    ready = live_api.client.get("/readyz")
    assert ready.status_code == 503
    checks = ready.json()["checks"]
    assert {name for name, state in checks.items() if state != "ok"} == {"worker"}
    assert "no worker was heard of" in checks["worker"]


def test_methods_are_listed_with_parameters(live_api: LiveApi) -> None:
    methods = live_api.client.get("/v1/methods").json()
    assert {"vgse", "kmeans", "smo", "sje", "eszsl"} <= {method["name"] for method in methods}
    one = live_api.client.get("/v1/methods/sje").json()
    assert one["parameters"]["properties"]["epochs"]["default"] == 100
