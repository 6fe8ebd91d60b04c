"""POST /v1/infer: images whose class nobody has described."""

from __future__ import annotations

from collections.abc import Callable

from service.answers import InferOut
from tests.service.harness import LiveApi, checked, png, problem

URL = "/v1/infer"
RAW = {"content-type": "image/png"}


def test_similar_and_dissimilar_classes_of_each_image(live_api: LiveApi) -> None:
    classifier = live_api.classifier(method="psr")
    live_api.classifier()  # newer, and of another method
    files = [("images", ("a.png", png(1))), ("images", ("b.png", b"junk"))]
    body = checked(live_api.client.post(URL, files=files, data={"tau": "0.2", "class_names": "cat, dog"}), InferOut)
    assert (body["classifier_id"], body["tau"]) == (classifier, 0.2)
    good, bad = body["data"]
    assert (good["filename"], good["error"], len(good["similar"])) == ("a.png", None, 2)
    assert "not an image" in bad["error"]
    kind, sent = live_api.inference.calls[-1]
    assert (kind, sent["class_names"], sent["tau"], sent["top_k"]) == ("infer", ["cat", "dog"], 0.2, 10)
    raw = live_api.client.post(f"{URL}?classifier_id={classifier}&top_k=1", content=png(2), headers=RAW)
    assert len(checked(raw, InferOut)["data"][0]["similar"]) == 1


def test_other_methods_and_missing_ones_are_refused(start_api: Callable[..., LiveApi]) -> None:
    api = start_api()
    problem(api.client.post(URL, content=png(1), headers=RAW), 404, "method 'psr'")
    other = api.classifier()
    problem(api.client.post(f"{URL}?classifier_id={other}", content=png(1), headers=RAW), 422, "of method 'sje'")
    queued = api.classifier("queued", method="psr")
    problem(api.client.post(f"{URL}?classifier_id={queued}", content=png(1), headers=RAW), 409, "queued")


def test_bad_options_and_bodies_say_what_is_wrong(live_api: LiveApi) -> None:
    live_api.classifier(method="psr")
    problem(live_api.client.post(f"{URL}?tau=2", content=png(1), headers=RAW), 422, "tau")
    problem(live_api.client.post(URL, files={"images": ("a", png(1))}, data={"tua": "0"}), 422, "'tau'")
    problem(live_api.client.post(URL, content=b"", headers=RAW), 422, "body is empty")
    problem(live_api.client.post(URL, json={"inputs": ""}), 415, "multipart/form-data")
