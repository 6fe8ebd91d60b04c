"""Joint classifiers are trained for the classes that compete beside the engine, each set once, while others answer."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from anyio.to_thread import current_default_thread_limiter
from starlette.requests import Request
from starlette.responses import Response

from models.base import FloatArray
from service.core.errors import Unavailable
from tests.service.harness import eventually
from tests.workers.colours import NAMES, RED, Dot, resident
from workers import heads as heads_module
from workers.engine import Engine
from workers.heads import KEPT_SETS, Heads
from workers.inference import Inference, _answering
from workers.known_classes import Competing
from workers.predictions import Resident


class Joint(Dot):
    """Trained when told to go on; what is trained scores, everything else must not be asked."""

    is_joint = True

    def __init__(self) -> None:
        self.trained: list[FloatArray] = []
        self.is_trained = False
        self.go = threading.Event()
        self.error: Exception | None = None

    def is_ready(self, class_embeddings: FloatArray) -> bool:
        return self.is_trained

    def prepared(self, class_embeddings: FloatArray) -> Dot:
        self.trained.append(class_embeddings)
        assert self.go.wait(20)
        if self.error is not None:
            raise self.error
        return Dot()

    def scores(self, features: FloatArray, class_embeddings: FloatArray) -> FloatArray:
        pytest.fail("asked before it was trained for these classes")


def joint(classifier: Joint, shift: float = 0.0) -> Resident:
    plain = resident()
    return dataclasses.replace(plain, classifier=classifier, embeddings=plain.embeddings + np.float32(shift))


async def begun(classifier: Joint, n_trainings: int) -> None:
    async with asyncio.timeout(20):
        while len(classifier.trained) < n_trainings:
            await asyncio.sleep(0.005)


async def given_up(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_each_set_of_classes_is_trained_once_and_one_that_nobody_waits_for_never() -> None:
    async def scenario() -> None:
        heads, classifier = Heads(), Joint()
        first, same, other = joint(classifier), joint(classifier), joint(classifier, 1.0)
        waiting = [asyncio.create_task(heads.prepared(asked)) for asked in (first, same)]
        await begun(classifier, 1)
        left = asyncio.create_task(heads.prepared(other))
        await asyncio.sleep(0.05)
        await given_up(left)
        for task in waiting:
            await given_up(task)
        again = asyncio.create_task(heads.prepared(first))  # what has begun goes on for whoever asks next
        classifier.go.set()
        trained = await again
        assert type(trained.classifier) is Dot
        assert (trained.backbone, trained.class_names) == (first.backbone, NAMES)
        assert heads.ready(first) is trained is await heads.prepared(first)
        assert heads.ready(other) is None
        await heads.prepared(same)
        assert len(classifier.trained) == 1
        assert (await heads.prepared(other)).embeddings is other.embeddings
        assert len(classifier.trained) == 2

    asyncio.run(scenario())


def test_what_is_ready_waits_for_nobody() -> None:
    async def scenario() -> None:
        heads, classifier = Heads(), Joint()
        classifier.is_trained = True
        asked, plain = joint(classifier), resident()
        assert heads.ready(asked) is None
        assert await heads.prepared(asked) is asked is heads.ready(asked)
        assert await heads.prepared(plain) is plain is heads.ready(plain)
        assert not classifier.trained
        classifier.is_trained = False  # another set of classes
        assert heads.ready(joint(classifier, 1.0)) is None

    asyncio.run(scenario())


def test_a_training_that_failed_is_tried_again() -> None:
    async def scenario() -> None:
        heads, classifier = Heads(), Joint()
        classifier.go.set()
        classifier.error = RuntimeError("no memory")
        with pytest.raises(RuntimeError, match="no memory"):
            await heads.prepared(joint(classifier))
        classifier.error = None
        await heads.prepared(joint(classifier))
        assert len(classifier.trained) == 2

    asyncio.run(scenario())


def test_how_many_sets_wait_and_stay_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        heads, classifier = Heads(), Joint()
        monkeypatch.setattr(heads_module, "MAX_UNPREPARED", 2)
        waiting = [asyncio.create_task(heads.prepared(joint(classifier, shift))) for shift in (1.0, 2.0)]
        async with asyncio.timeout(20):
            while len(heads._heads.get(classifier, ())) < 2:
                await asyncio.sleep(0.005)
        with pytest.raises(Unavailable, match="2 sets of classes"):
            await heads.prepared(joint(classifier, 3.0))
        classifier.go.set()
        await asyncio.gather(*waiting)
        for shift in range(KEPT_SETS + 3):
            await heads.prepared(joint(classifier, float(shift)))
        (kept,) = heads._heads.values()
        assert len(kept) == KEPT_SETS
        n_trained = len(classifier.trained)
        await heads.prepared(joint(classifier, float(KEPT_SETS + 2)))
        assert len(classifier.trained) == n_trained
        del classifier, waiting, kept
        gc.collect()
        assert not heads._heads  # it goes with the classifier

    asyncio.run(scenario())


class Shelf:
    """A library of one classifier, which takes its time to load."""

    def __init__(self, *loaded: Resident) -> None:
        self.loaded = {f"cl_{number}": each for number, each in enumerate(loaded)}
        self.go = threading.Event()
        self.go.set()

    def competing_at_once(self, state: Any, _scope: str) -> Competing | None:
        return Competing(self.loaded[state.id], {}) if self.go.is_set() else None

    def competing(self, state: Any, _scope: str, _names: object) -> Competing:
        assert self.go.wait(20)
        return Competing(self.loaded[state.id], {})

    def forget_deleted(self) -> None:
        pass

    def newest_classifier(self) -> str:
        return "cl_0"

    def state(self, classifier_id: str) -> Any:
        return type("State", (), {"id": classifier_id})


async def ask(handler: Callable[[Request], Awaitable[Response]], number: int, timeout_s: float) -> tuple[int, Any]:
    """Status and answer to a request about one red image."""
    state = dict.fromkeys(("method", "status", "job_id", "embedding_set_id", "knowledge_id"), "") | {"version": 0}
    options = {
        "classifier": {"id": f"cl_{number}", **state}, "scope": "all", "class_names": None, "gamma": None, "top_k": 1,
        "explain": False, "timeout_s": timeout_s, "sizes": [len(RED)],
    }  # fmt: skip
    header = json.dumps(options).encode()
    body = len(header).to_bytes(4, "little") + header + RED
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()  # the caller stays
        return messages.pop()

    answer = await _answering(handler)(Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive))
    return answer.status_code, json.loads(bytes(answer.body))


def test_others_are_answered_while_a_joint_classifier_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.engine.FRESH_S", 0.0)
    classifier = Joint()
    shelf: Any = Shelf(joint(classifier), resident())

    async def scenario(inference: Inference) -> None:
        status, problem = await ask(inference.classify, 0, 0.05)
        assert (status, problem["title"]) == (504, "Deadline exceeded")
        assert (await ask(inference.classify, 1, 20))[0] == 200
        waiting = asyncio.create_task(ask(inference.classify, 0, 20))
        await begun(classifier, 1)
        await asyncio.to_thread(inference.engine.probe, 5.0)
        classifier.go.set()
        status, answer = await waiting
        assert (status, answer["results"][0]["predictions"][0]["label"]) == (200, "red")
        assert len(classifier.trained) == 1

    with Engine() as engine:
        inference = Inference(shelf, engine)
        inference.warm_up()
        assert (engine.stats().n_images, classifier.trained) == (1, [])
        asyncio.run(scenario(inference))


def test_loading_counts_as_time_of_the_request() -> None:
    shelf: Any = Shelf(resident())
    shelf.go.clear()
    with Engine() as engine:

        async def scenario() -> None:
            inference = Inference(shelf, engine)
            assert (await ask(inference.classify, 0, 0.05))[0] == 504
            async with asyncio.timeout(20):  # what nobody waits for any more goes on, and counts among the threads
                while current_default_thread_limiter().borrowed_tokens != 1:
                    await asyncio.sleep(0.005)
            shelf.go.set()
            assert (await ask(inference.classify, 0, 20))[0] == 200

        asyncio.run(scenario())
        eventually(lambda: engine.stats().n_waiting == 0)
        assert engine.stats().n_images == 1
