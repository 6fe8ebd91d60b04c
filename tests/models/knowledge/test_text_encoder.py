from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

from models.base import Progress
from models.errors import InvalidInput, MissingKnowledge
from models.knowledge.base import require
from models.knowledge.text_encoder import TextEncoder


class LetterCounts:
    """A fake encoder: how often each letter occurs, so that expected numbers can be written down."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, texts: list[str]) -> np.ndarray[Any, Any]:
        self.batches.append(texts)
        return np.array([[text.lower().count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts], np.float64)


def test_names_are_encoded_as_readable_sentences() -> None:
    fake = LetterCounts()
    encoder = TextEncoder("fake", "a drawing of a {}.", encode=fake)
    lookup = encoder.lookup(["grizzly_bear", "002.Laysan_Albatross"])
    assert fake.batches[-1] == ["a drawing of a grizzly bear.", "a drawing of a Laysan Albatross."]
    assert (encoder.kind, encoder.dim, lookup.vectors.dtype) == ("text_encoder", 26, np.dtype(np.float32))
    assert lookup.vectors[0, 25] == 2  # the two z of grizzly
    assert lookup.resolutions[0].how == "encoded: a drawing of a grizzly bear."


def test_batches_are_limited_and_keep_the_order() -> None:
    fake, seen = LetterCounts(), list[Progress]()
    names = [f"c{'x' * i}" for i in range(1, 8)]
    lookup = TextEncoder("fake", "{}", encode=fake, batch_size=3, on_progress=seen.append).lookup(names)
    assert [len(batch) for batch in fake.batches[1:]] == [3, 3, 1]
    assert lookup.vectors[:, 23].tolist() == list(range(1, 8))
    assert [(p.completed, p.total) for p in seen] == [(3, 7), (6, 7), (7, 7)]


def test_only_names_without_content_are_missing() -> None:
    lookup = TextEncoder("fake", encode=LetterCounts()).lookup(["--", "cat"])
    assert [r.found for r in lookup.resolutions] == [False, True]
    with pytest.raises(MissingKnowledge):
        require(lookup)


def test_braces_in_names_are_plain_text() -> None:
    fake = LetterCounts()
    TextEncoder("fake", encode=fake).lookup(["{} {0} {x}"])
    assert fake.batches[-1] == ["a photo of a {} {0} {x}"]


@pytest.mark.parametrize("template", ["", "a photo", "{} and {}", "{}" + "x" * 1000])
def test_templates_need_exactly_one_place_for_the_name(template: str) -> None:
    with pytest.raises(InvalidInput, match="once") as caught:
        TextEncoder("fake", template, encode=LetterCounts())
    assert caught.value.field == "template"


@pytest.mark.parametrize(
    "answer",
    [np.ones((1, 3)), np.ones(2), np.array([[1, 2], [np.nan, 1]]), np.array([[1, 2], [0, 0]]), np.ones((2, 4))],
)
def test_answers_of_a_broken_encoder_are_refused(answer: np.ndarray[Any, Any]) -> None:
    """The encoder has answered with two numbers before."""
    answers = iter([np.ones((1, 2)), answer])
    with pytest.raises(InvalidInput, match="text encoder 'fake' gave"):
        TextEncoder("fake", encode=lambda texts: next(answers)).lookup(["cat", "dog"])


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is not None, reason="the extra 'text' is installed"
)
def test_a_missing_extra_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"unseen\[text\]"):
        TextEncoder("all-MiniLM-L6-v2")


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="the extra 'text' is not installed"
)
def test_a_model_that_is_not_there_is_named(tmp_path: Any) -> None:
    with pytest.raises(InvalidInput, match="cannot be loaded"):
        TextEncoder(tmp_path / "nothing")
