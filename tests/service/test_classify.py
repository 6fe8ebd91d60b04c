"""POST /v1/classify in its three shapes."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.responses import Response

from models.errors import InvalidInput
from service.answers import ClassifyOut
from service.core.errors import problem_of
from tests.service.harness import LiveApi, checked, png, problem

URL = "/v1/classify"


@pytest.fixture(scope="module")
def classifier(live_api: LiveApi) -> str:
    """The newest ready classifier."""
    return live_api.classifier()


def test_one_bad_image_among_good_ones(live_api: LiveApi, classifier: str) -> None:
    names = ("a.png", "b.png", "c.png", "d.png")
    contents = (png(1), png(2)[:40], b"", png(3))
    files = [("images", pair) for pair in zip(names, contents, strict=True)]
    body = checked(live_api.client.post(URL, files=files, data={"top_k": "2"}), ClassifyOut)
    assert (body["classifier_id"], body["scope"]) == (classifier, "all")
    assert [(item["index"], item["filename"]) for item in body["data"]] == list(enumerate(names))
    assert [len(item["predictions"]) for item in body["data"]] == [2, 0, 0, 2]
    assert "damaged or cut off" in body["data"][1]["error"]
    assert "empty (0 bytes)" in body["data"][2]["error"]
    assert body["data"][0]["error"] is None
    assert set(body["data"][0]["predictions"][0]) == {"label", "score", "seen"}


def test_options_in_the_form_reach_the_inference_process(live_api: LiveApi, classifier: str) -> None:
    form = {
        "classifier_id": classifier, "scope": "unseen", "class_names": '["zebra", "ok, api"]', "top_k": "1",
        "gamma": "0.25", "explain": "true",
    }  # fmt: skip
    image = png(4)
    body = checked(live_api.client.post(URL, files={"images": ("a", image)}, data=form), ClassifyOut)
    kind, sent = live_api.inference.calls[-1]
    assert kind == "classify"
    assert sent.pop("classifier") == {
        "id": classifier, "method": "sje", "status": "ready", "job_id": "job_x", "embedding_set_id": None,
        "knowledge_id": None, "version": 0,
    }  # fmt: skip
    assert sent == {
        "scope": "unseen", "class_names": ["zebra", "ok, api"], "top_k": 1, "gamma": 0.25,
        "explain": True, "sizes": [len(image)], "timeout_s": 60.0,
    }  # fmt: skip
    assert (body["gamma"], body["scope"]) == (0.25, "unseen")
    assert body["data"][0]["explanation"] is not None


def test_class_names_by_comma_or_repeated(live_api: LiveApi, classifier: str) -> None:
    for names, expected in (("a, b", ["a", "b"]), (["a, b", "c"], ["a, b", "c"])):
        live_api.client.post(URL, files={"images": ("a", png(1))}, data={"class_names": names})
        assert live_api.inference.calls[-1][1]["class_names"] == expected


@pytest.mark.parametrize("content_type", ["image/png", "image/jpeg", "application/octet-stream"])
def test_a_raw_image_with_options_in_the_query(live_api: LiveApi, classifier: str, content_type: str) -> None:
    response = live_api.client.post(
        f"{URL}?top_k=1&scope=seen&class_names=cat&class_names=dog",
        content=png(5),
        headers={"content-type": content_type},
    )
    body = checked(response, ClassifyOut)
    assert (len(body["data"]), body["scope"], len(body["data"][0]["predictions"])) == (1, "seen", 1)
    assert live_api.inference.calls[-1][1]["class_names"] == ["cat", "dog"]


def test_options_of_the_query_are_checked_as_those_of_the_form(live_api: LiveApi, classifier: str) -> None:
    before, headers = len(live_api.inference.calls), {"content-type": "image/png"}
    for query, pointer, words in (
        ("top-k=3", "/query/top-k", "Did you mean 'top_k'?"),
        ("top_k=0", "/query/top_k", "greater than or equal to 1"),
        ("scope=some", "/query/scope", "'unseen', 'seen' or 'all'"),
        ("gamma=inf", "/query/gamma", "finite number"),
        ("class_names=cat&class_names=%20", "/query/class_names/1", "is empty"),
    ):
        refused = problem(live_api.client.post(f"{URL}?{query}", content=png(5), headers=headers), 422, words)
        assert refused["errors"][0]["pointer"] == pointer
    assert len(live_api.inference.calls) == before


def test_errors_point_to_where_an_option_was_stated(live_api: LiveApi, classifier: str) -> None:
    def pointers(response: httpx.Response) -> list[str]:
        return [entry["pointer"] for entry in problem(response, 422)["errors"]]

    form = {"files": {"images": ("a", png(1))}}
    assert pointers(live_api.client.post(f"{URL}?gamma=x", data={"top_k": "0"}, **form)) == ["/top_k", "/query/gamma"]
    assert pointers(live_api.client.post(f"{URL}?top_k=0", data={"top_k": "0"}, **form)) == ["/top_k"]
    assert pointers(live_api.client.post(f"{URL}?top_k=0", json={})) == ["/inputs", "/parameters"]
    twice = {"candidate_labels": ["cat", "Cat"]}
    assert pointers(hugging_face(live_api, parameters=twice)) == ["/parameters/candidate_labels/1"]
    refusal = problem_of(InvalidInput("No vector for 'okapi'.", field="class_names"))
    live_api.inference.answer = Response(json.dumps(refusal), status_code=422)
    headers = {"content-type": "image/png"}
    try:
        asked = live_api.client.post(f"{URL}?class_names=okapi", content=png(1), headers=headers)
        sc_egg = live_api.classifier(method="sc_egg")
        looked = live_api.client.post(
            f"/v1/classifiers/{sc_egg}/attention?class_name=okapi", content=png(1), headers=headers
        )
    finally:
        live_api.inference.answer = None
    assert (pointers(asked), pointers(looked)) == (["/query/class_names"], ["/query/class_name"])


def test_a_raw_body_that_is_no_image(live_api: LiveApi, classifier: str) -> None:
    headers = {"content-type": "image/png"}
    answer = checked(live_api.client.post(URL, content=b"junk", headers=headers), ClassifyOut)
    assert "not an image" in answer["data"][0]["error"]
    problem(live_api.client.post(URL, content=b"", headers=headers), 422, "body is empty")


def hugging_face(api: LiveApi, **body: Any) -> Any:
    given = {"inputs": base64.b64encode(png(6)).decode(), "parameters": {"candidate_labels": ["cat", "dog", "owl"]}}
    return api.client.post(URL, json={**given, **body})


def test_hugging_face_shape(live_api: LiveApi, classifier: str) -> None:
    body = hugging_face(live_api).json()
    assert sorted(entry["label"] for entry in body) == ["cat", "dog", "owl"]
    assert all(set(entry) == {"label", "score"} for entry in body)
    assert [entry["score"] for entry in body] == sorted((entry["score"] for entry in body), reverse=True)
    as_url = hugging_face(live_api, inputs="data:image/png;base64," + base64.b64encode(png(6)).decode())
    assert as_url.json() == body
    top = hugging_face(
        live_api, parameters={"candidate_labels": ["cat", "dog"], "top_k": 1, "hypothesis_template": "x"}
    )
    assert len(top.json()) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"inputs": "not base64!"}, "base64"),
        ({"inputs": "é"}, "/inputs"),
        ({"inputs": base64.b64encode(b"junk").decode()}, "not an image"),
        ({"inputs": ""}, "empty"),
        ({"parameters": {"candidate_labels": []}}, "at least 1 item"),
        ({"parameters": {"candidate_labels": ["cat", "Cat"]}}, "same name"),
        ({"parameters": {}}, "/parameters/candidate_labels"),
        ({"input": "x"}, "Did you mean 'inputs'?"),
    ],
)
def test_bad_hugging_face_bodies(live_api: LiveApi, classifier: str, body: dict[str, Any], words: str) -> None:
    problem(hugging_face(live_api, **body), 422, words)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"scope": "unsen"}, "'unseen', 'seen' or 'all'"),
        ({"top_k": "0"}, "greater than or equal to 1"),
        ({"top_k": "many"}, "valid integer"),
        ({"gamma": "nan"}, "finite number"),
        ({"gamma": "1e39"}, "less than or equal to 1000"),
        ({"class_names": "[1, 2"}, "no valid JSON list"),
        ({"class_names": "cat,,dog"}, "is empty"),
        ({"class_names": "[]"}, "leave it out"),
        ({"class_names": "cat,CAT"}, "same name"),
    ],
)
def test_bad_options(live_api: LiveApi, classifier: str, form: dict[str, str], words: str) -> None:
    before = len(live_api.inference.calls)
    problem(live_api.client.post(URL, files={"images": ("a", png(1))}, data=form), 422, words)
    assert len(live_api.inference.calls) == before


def test_bad_requests_as_a_whole(live_api: LiveApi, classifier: str) -> None:
    problem(live_api.client.post(URL, files={"pictures": ("a", png(1))}), 422, "field 'images'")
    problem(live_api.client.post(URL, content=b"x", headers={"content-type": "text/plain"}), 415, "image/*")
    problem(live_api.client.post(URL, content=b"x"), 415, "without Content-Type")
    many = [("images", (f"{i}", b"x")) for i in range(65)]
    problem(live_api.client.post(URL, files=many), 413, "65 images", "at most 64")
    problem(live_api.client.post(URL, content=b"{", headers={"content-type": "application/json"}), 422, "JSON")


def test_classifiers_that_cannot_answer(live_api: LiveApi, start_api: Callable[..., LiveApi]) -> None:
    image = {"images": ("a", png(1))}
    problem(live_api.client.post(f"{URL}?classifier_id=cl_x", files=image), 404, "cl_x")
    waiting = live_api.classifier("queued")
    problem(live_api.client.post(URL, files=image, data={"classifier_id": waiting}), 409, "queued", "job_x")
    fresh = start_api()
    problem(fresh.client.post(URL, files=image), 404, "no ready classifier", "POST /v1/classifiers")


def test_an_image_past_the_limit_is_told_alone(start_api: Callable[..., LiveApi]) -> None:
    api = start_api(max_image_bytes=2000)
    api.classifier()
    files = [("images", ("small", png(1))), ("images", ("large", png(2, 64)))]
    body = checked(api.client.post(URL, files=files), ClassifyOut)
    assert body["data"][0]["predictions"]
    assert "at most 2,000" in body["data"][1]["error"]
    assert api.inference.calls[-1][1]["sizes"][1] == 0
    problem(api.client.post(URL, content=png(2, 64), headers={"content-type": "image/png"}), 413, "at most 2,000")


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (Response(b"not json"), 503, "no usable answer"),
        (Response(b"{}", status_code=500), 503, "no usable answer"),
        (Response(json.dumps({"detail": "Busy."}), status_code=503, headers={"retry-after": "7"}), 503, "Busy"),
        (Response(json.dumps({"detail": "secret"}), status_code=500), 503, "no usable answer"),
        (Response(json.dumps({"detail": "Too many."}), status_code=413), 413, "Too many"),
    ],
)
def test_answers_of_a_sick_inference_process(
    live_api: LiveApi, classifier: str, answer: Response, status: int, words: str
) -> None:
    live_api.inference.answer = answer
    try:
        response = live_api.client.post(URL, files={"images": ("a", png(1))})
    finally:
        live_api.inference.answer = None
    body = problem(response, status, words)
    assert "secret" not in body["detail"]
    if "retry-after" in answer.headers:
        assert response.headers["retry-after"] == "7"


def test_a_deadline_reaches_the_inference_process_and_comes_back_as_504(live_api: LiveApi, classifier: str) -> None:
    headers = {"content-type": "image/png"}
    live_api.client.post(f"{URL}?timeout_s=2.5", content=png(1), headers=headers)
    assert live_api.inference.calls[-1][1]["timeout_s"] == 2.5
    live_api.inference.answer = Response(json.dumps({"detail": "Over."}), status_code=504)
    try:
        problem(live_api.client.post(URL, files={"images": ("a", png(1))}, data={"timeout_s": "1"}), 504, "Over")
    finally:
        live_api.inference.answer = None
    problem(live_api.client.post(f"{URL}?timeout_s=0", content=png(1), headers=headers), 422, "timeout_s")


def test_work_is_dropped_when_the_caller_hangs_up(live_api: LiveApi, classifier: str) -> None:
    live_api.inference.hold.clear()
    try:
        with pytest.raises(httpx.ReadTimeout):
            live_api.client.post(URL, files={"images": ("a", png(1))}, timeout=0.5)
        assert live_api.inference.gone.wait(10)
    finally:
        live_api.inference.hold.set()


def test_no_inference_process(start_api: Callable[..., LiveApi]) -> None:
    api = start_api()
    api.classifier()
    api.stop_inference()
    response = api.client.post(URL, files={"images": ("a", png(1))})
    problem(response, 503, "restarts by itself")
    assert int(response.headers["retry-after"]) > 0


def test_below_min_score_it_abstains(live_api: LiveApi, classifier: str) -> None:
    for min_score, abstained in (("0.4", False), ("0.6", True)):  # the best is at 0.5
        files = [("images", ("a.png", png(1))), ("images", ("b.png", b"junk"))]
        body = checked(live_api.client.post(URL, files=files, data={"min_score": min_score}), ClassifyOut)
        assert [item["abstained"] for item in body["data"]] == [abstained, False]
        assert body["data"][0]["predictions"]
    problem(live_api.client.post(f"{URL}?min_score=2", content=png(1), headers={"content-type": "image/png"}), 422)
