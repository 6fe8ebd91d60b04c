"""GET /metrics: valid in Prometheus' format, exact, and of use while other parts are down."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from tests.service.harness import LiveApi, png, problem
from tests.service.tasks import trained_classifier

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scraped(api: LiveApi) -> Samples:
    answer = api.client.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(answer.text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def of(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, frozenset(labels.items())))


def test_requests_are_counted_by_route_method_and_status(own_api: LiveApi) -> None:
    dataset = own_api.dataset()
    for _ in range(3):
        own_api.client.get(f"/v1/datasets/{dataset}")
    own_api.client.get("/v1/datasets/ds_nothing")
    for nonsense in ("/nowhere", "/nowhere/else"):
        own_api.client.get(nonsense)
    own_api.client.request("PROPFIND", "/v1/datasets")
    samples = scraped(own_api)
    one = {"method": "GET", "route": "/v1/datasets/{dataset_id}"}
    assert of(samples, "unseen_http_requests_total", **one, status="200") == 3
    assert of(samples, "unseen_http_requests_total", **one, status="404") == 1
    assert of(samples, "unseen_http_request_duration_seconds_count", **one) == 4
    assert of(samples, "unseen_http_request_duration_seconds_bucket", **one, le="+Inf") == 4
    assert of(samples, "unseen_http_requests_total", method="POST", route="/v1/datasets", status="201") == 1
    # Labels stay few whatever strangers ask for.
    assert of(samples, "unseen_http_requests_total", method="GET", route="none", status="404") == 2
    assert {dict(labels).get("method") for name, labels in samples if name == "unseen_http_requests_total"} == {
        "GET",
        "POST",
        "other",
    }
    assert of(samples, "unseen_http_requests_in_progress") == 1  # this one


def test_jobs_workers_and_the_inference_process(inferring_api: LiveApi) -> None:
    before = of(scraped(inferring_api), "unseen_inference_images_total")
    assert before is not None  # probes of the device count, too
    classifier = trained_classifier(inferring_api)["id"]
    for seed in range(2):
        answer = inferring_api.client.post(
            f"/v1/classify?classifier_id={classifier}", content=png(seed), headers={"content-type": "image/png"}
        )
        assert answer.status_code == 200, answer.text
    inferring_api.knowledge(status="queued")
    samples = scraped(inferring_api)
    n_images, n_batches = (of(samples, f"unseen_inference_{what}_total") for what in ("images", "batches"))
    assert n_images is not None
    assert n_images >= before + 2
    assert n_batches == n_images  # one request after the other
    assert of(samples, "unseen_inference_waiting_images") == 0
    assert of(samples, "unseen_inference_classifiers") == 1
    assert (of(samples, "unseen_inference_model_bytes") or 0) > 1000
    assert of(samples, "unseen_inference_up") == 1
    assert of(samples, "unseen_workers") == 0
    assert of(samples, "unseen_jobs", kind="index_knowledge", status="queued") == 1


def test_a_part_that_is_down_hides_no_other(own_api: LiveApi) -> None:
    own_api.stop_inference()
    own_api.knowledge(status="queued")
    samples = scraped(own_api)
    assert of(samples, "unseen_inference_up") == 0
    assert of(samples, "unseen_inference_images_total") is None
    assert of(samples, "unseen_jobs", kind="index_knowledge", status="queued") == 1


def test_a_database_that_fails_hides_the_others_no_more(inferring_api: LiveApi) -> None:
    with inferring_api.parts.database.write() as session:
        session.execute(text("DROP TABLE workers"))
    samples = scraped(inferring_api)
    assert of(samples, "unseen_inference_up") == 1
    assert not [name for name, _ in samples if name in ("unseen_jobs", "unseen_workers")]


def test_it_needs_a_key_that_may_read(start_api: Callable[..., LiveApi]) -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    api = start_api(api_keys=f"prometheus:{digest}:read")
    problem(api.client.get("/metrics"), 401, "API key")
    assert api.client.get("/metrics", headers={"authorization": "Bearer secret"}).status_code == 200
