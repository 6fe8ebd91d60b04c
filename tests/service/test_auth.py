"""API keys: who may do what, and that a refusal tells nothing."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from contextlib import suppress

import pytest

from service.app import create_app
from service.auth import Authenticator, parse_keys
from service.core.errors import RateLimited
from service.core.settings import Settings
from service.rate_limit import RateLimiter
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


def test_a_key_past_its_rate_waits_and_others_do_not(start_api: Callable[..., LiveApi]) -> None:
    api = start_api(api_keys=KEYS, rate_limit_per_minute=3)
    ann, root = ({"Authorization": f"Bearer {key}"} for key in ("ann-key", "r"))
    assert [api.client.get("/v1/datasets", headers=ann).status_code for _ in range(3)] == [200] * 3
    response = api.client.get("/v1/datasets", headers=ann)
    assert problem(response, 429, "3 requests a minute")["type"] == "urn:unseen:problem:rate-limited"
    assert 1 <= int(response.headers["retry-after"]) <= 20
    assert api.client.get("/v1/datasets", headers=root).status_code == 200
    assert [api.client.get("/healthz").status_code for _ in range(5)] == [200] * 5
    problem(api.client.get("/v1/datasets", headers={"Authorization": "Bearer nobody"}), 401)


def test_a_bucket_refills_evenly_and_never_overflows() -> None:
    now = 0.0
    limiter = RateLimiter(60, clock=lambda: now)

    def allowed(n: int) -> int:
        n_allowed = 0
        for _ in range(n):
            with suppress(RateLimited):
                limiter.take("ann")
                n_allowed += 1
        return n_allowed

    assert allowed(70) == 60
    now += 5
    assert allowed(70) == 5
    now += 0.6
    with pytest.raises(RateLimited) as refused:
        limiter.take("ann")
    assert refused.value.retry_after_s == 1
    now += refused.value.retry_after_s
    assert allowed(2) == 1
    now += 10_000
    assert allowed(70) == 60
    free = RateLimiter(0)
    for _ in range(1000):
        free.take("ann")


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


def test_the_page_of_docs_needs_no_other_server_and_no_key(api: LiveApi) -> None:
    page = api.client.get("/", follow_redirects=True)
    assert (page.status_code, page.url.path) == (200, "/docs")
    assert "://" not in page.text
    assets = re.findall(r'(?:src|href)="(/[^"]+)"', page.text)
    assert len(assets) == 2
    for path in assets:
        assert len(api.client.get(path).content) > 100_000, path
    problem(api.client.get("/docs/static/nothing.js"), 404)


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
