"""The inference engine with many requests at a time: which of them share a batch, and which an answer."""

from __future__ import annotations

import time
from concurrent.futures import Future, wait
from dataclasses import replace

import pytest

from models.base import FloatArray
from models.errors import InvalidInput
from tests.service.harness import eventually
from tests.workers.colours import (
    BLUE,
    GREEN,
    RED,
    Dot,
    MeanColour,
    labels,
    resident,
)
from workers.engine import Engine
from workers.predictions import ImageError, Prediction, Resident


def test_images_of_many_requests_share_batches_and_none_is_larger_than_allowed() -> None:
    backbone = MeanColour()
    backbone.go.clear()
    model = resident(backbone)
    with Engine(max_batch=8, max_wait_ms=200, decode_threads=2) as engine:
        futures = [engine.classify(model, [RED]) for _ in range(25)]
        time.sleep(0.5)  # the first batch hangs in the backbone; the others gather behind it
        backbone.go.set()
        wait(futures, timeout=20)
        assert [labels(future.result())[0] for future in futures] == ["red"] * 25
    assert sum(backbone.batches) == 25
    assert max(backbone.batches) == 8
    assert len(backbone.batches) <= 6


class CountingDot(Dot):
    """Counts the rows of each call; refuses calls with what looks red."""

    def __init__(self, *, refuses_red: bool = False) -> None:
        self.calls: list[int] = []
        self._refuses_red = refuses_red

    def scores(self, features: FloatArray, class_embeddings: FloatArray) -> FloatArray:
        self.calls.append(len(features))
        if self._refuses_red and (features[:, 0] > features[:, 1:].max(axis=1)).any():
            raise InvalidInput("No red, please.")
        return super().scores(features, class_embeddings)


def answered_at_once(asked: list[tuple[Resident, bytes, int]]) -> list[Future[list[list[Prediction] | ImageError]]]:
    """Requests of one image each (resident, image, top_k) that go through the network in one batch, done."""
    backbone = asked[0][0].backbone
    assert isinstance(backbone, MeanColour)
    backbone.go.clear()
    with Engine(max_wait_ms=200, decode_threads=2) as engine:
        first = engine.classify(asked[0][0], [BLUE])
        eventually(lambda: len(backbone.batches) == 1)  # it hangs in the backbone; the others gather behind it
        futures = [engine.classify(model, [image], top_k=k) for model, image, k in asked]
        eventually(lambda: engine.stats().n_waiting == 1 + len(asked))
        time.sleep(0.3)
        backbone.go.set()
        wait([first, *futures], timeout=20)
    assert backbone.batches == [1, len(asked)]
    return futures


def test_requests_that_ask_the_same_are_answered_together() -> None:
    scorer = CountingDot()
    model = replace(resident(), classifier=scorer)
    asked = [
        (model, RED, 5),
        (model, GREEN, 5),
        (model, BLUE, 1),
        (replace(model, gamma=0.5), GREEN, 5),
        (model, GREEN, 1),
    ]
    told = [future.result()[0] for future in answered_at_once(asked)]
    assert [[p.label for p in answer][:2] for answer in told if not isinstance(answer, ImageError)] == [
        ["red", "grey"], ["green", "grey"], ["blue"], ["green", "grey"], ["green"],
    ]  # fmt: skip
    assert sorted(scorer.calls) == [1, 1, 2, 2]  # the first image alone; one other gamma; two of each top_k


def test_a_request_that_cannot_be_answered_spoils_no_other_of_its_kind() -> None:
    model = replace(resident(), classifier=CountingDot(refuses_red=True))
    red, green, blue = answered_at_once([(model, RED, 1), (model, GREEN, 1), (model, BLUE, 1)])
    with pytest.raises(InvalidInput, match="No red"):
        red.result()
    assert [labels(future.result()) for future in (green, blue)] == [["green"], ["blue"]]


@pytest.mark.parametrize("queues", [True, False])
def test_a_second_batch_is_under_way_where_networks_queue_them_up(queues: bool) -> None:
    backbone = MeanColour()
    backbone.queues = queues
    backbone.go.clear()
    model = resident(backbone)
    with Engine(max_batch=2, batches_ahead=1) as engine:
        futures = [engine.classify(model, [image]) for image in (RED, GREEN, BLUE) * 3]
        eventually(lambda: engine.stats().n_waiting == 9 and len(backbone.batches) == 1 + queues)
        time.sleep(0.3)
        assert len(backbone.batches) == 1 + queues  # the others wait
        backbone.go.set()
        wait(futures, timeout=20)
    assert [labels(future.result())[0] for future in futures] == ["red", "green", "blue"] * 3
    assert sum(backbone.batches) == 9
