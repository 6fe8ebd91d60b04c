"""API keys: who may do what, and that a refusal tells nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest

from service.app import create_app
from service.auth import Authenticator, parse_keys
from service.core.settings import Settings
from tests.service.harness import LiveApi, problem


def entry(name: str, key: str, scopes: str) -> str:
    return f"{name}:{hashlib.sha256(key.encode()).hexdigest()}:{scopes}"


KEYS = ", ".join([entry("ann", "ann-key", "read"), entry("bob", "bob-key", "write+read"), entry("root", "r", "admin")])


@pytest.fixture
def api(start_api: Callable[..., LiveApi]) -> LiveApi:
    """An API with three keys."""
    return start_api(api_keys=KEYS)


def test_who_may_do_what(api: LiveApi) -> None:
    def status(method: str, key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        return api.client.request(method, "/v1/datasets", headers=headers, json={"name": "d"}).status_code

    assert [status("GET", key) for key in ("ann-key", "bob-key", "r")] == [200, 200, 200]
    assert [status("POST", key) for key in ("ann-key", "bob-key", "r")] == [403, 201, 201]
    headers = {"Authorization": "Bearer ann-key"}
    problem(api.client.post("/v1/datasets", headers=headers, json={"name": "d"}), 403, "scope 'write'")
    assert api.client.get("/v1/datasets", headers={"X-API-Key": "ann-key"}).status_code == 200
    assert api.client.get("/v1/datasets", headers={"Authorization": "bearer ann-key"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer ann-ke"},
        {"Authorization": "Bearer ann-keyy"},
        {"Authorization": "Basic ann-key"},
        {"Authorization": "ann-key"},
        {"X-API-Key": "nope"},
    ],
)
def test_every_refusal_is_the_same(api: LiveApi, headers: dict[str, str]) -> None:
    for path in ("/v1/datasets", "/v1/nowhere", "/v1/datasets/ds_x"):
        response = api.client.get(path, headers=headers)
        body = problem(response, 401, "Authorization: Bearer KEY")
        assert body["detail"] == "Send a valid API key as 'Authorization: Bearer KEY'."
        assert response.headers["www-authenticate"] == "Bearer"


def test_a_refused_body_is_not_kept(api: LiveApi) -> None:
    before = api.snapshot()
    problem(api.client.post("/v1/knowledge", files={"file": ("g.txt", b"x" * 500_000)}), 401)
    assert api.snapshot() == before


def test_health_and_docs_are_open(api: LiveApi) -> None:
    for path in ("/healthz", "/version", "/docs", "/openapi.json"):
        assert api.client.get(path).status_code == 200, path
    assert api.client.get("/readyz").status_code in (200, 503)


def test_an_idempotency_key_belongs_to_its_caller(api: LiveApi) -> None:
    ids = set()
    for key in ("bob-key", "r"):
        headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": "k"}
        ids.add(api.client.post("/v1/datasets", headers=headers, json={"name": "d"}).json()["id"])
    assert len(ids) == 2


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org", ""])
def test_listening_beyond_loopback_without_keys_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="without API keys"):
        create_app(Settings(host=host))
    create_app(Settings(host=host, api_keys=KEYS))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_loopback_needs_none(host: str) -> None:
    assert Authenticator(Settings(host=host)).check("POST", "/v1/datasets", None, None) == "anonymous"


@pytest.mark.parametrize(
    ("text", "words"),
    [("ann", "name:sha256"), ("ann:abc:read", "name:sha256"), (entry("ann", "k", "root"), "unknown scopes")],
)
def test_malformed_keys_stop_the_start(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_keys(text)


def test_an_empty_key_never_opens() -> None:
    authenticator = Authenticator(Settings(api_keys=entry("hole", "", "admin")))
    for header in (None, "", "Bearer ", "Bearer"):
        with pytest.raises(Exception, match="valid API key"):
            authenticator.check("GET", "/v1/datasets", header, None)
