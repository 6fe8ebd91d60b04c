"""Whether the inference device computes: probes, and the watchdog that ends the process; and callers who hang up."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch
from starlette.requests import Request
from starlette.responses import Response

from service.core.disconnect import CLIENT_GONE
from tests.workers.colours import RED, MeanColour, classified, resident
from workers.engine import Engine, EngineClosed, EngineSick
from workers.inference import Handler, _answering, watch


def test_a_probe_sends_an_image_through_the_network_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = MeanColour()
    model = resident(backbone)
    with Engine() as engine:
        engine.probe()  # no network yet: the device alone
        assert engine.stats().n_images == 1
        classified(engine, model, [RED])
        engine.probe()  # that batch went well a moment ago
        assert (backbone.batches, engine.stats().n_images) == ([1], 2)
        monkeypatch.setattr("workers.engine.FRESH_S", 0.0)
        engine.probe()
        assert backbone.batches == [1, 1]
        backbone.error = RuntimeError("CUDA error: device-side assert triggered")
        with pytest.raises(EngineSick, match="device-side assert"):
            engine.probe()
        backbone.error = None
        engine.probe()
        monkeypatch.setattr(backbone, "features", lambda images: torch.full((len(images), 3), float("nan")))
        with pytest.raises(EngineSick, match="no numbers"):
            engine.probe()
        assert engine.stats().n_waiting == 0


def test_a_probe_tells_a_device_that_hangs_from_a_long_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.engine.FRESH_S", 0.0)
    backbone = MeanColour()
    with Engine(max_batch=1) as engine:
        model = resident(backbone)
        classified(engine, model, [RED])
        slow = MeanColour.features
        monkeypatch.setattr(backbone, "features", lambda images: (time.sleep(0.05), slow(backbone, images))[1])
        queued = engine.classify(model, [RED] * 20)
        engine.probe(timeout_s=0.4)  # behind a second's work, of which each twentieth ends in time
        assert len(queued.result(timeout=20)) == 20
        backbone.go.clear()
        with pytest.raises(EngineSick, match="not finished a batch"):
            engine.probe(timeout_s=0.2)
        backbone.go.set()
        engine.probe()


def test_the_watchdog_ends_the_process_when_the_device_stays_sick() -> None:
    ends: list[int] = []

    class Patient:
        def __init__(self, *states: Exception | None) -> None:
            self.states = list(states)

        def probe(self) -> None:
            if (state := self.states.pop(0)) is not None:
                raise state

    sick = EngineSick("The device failed.")
    for states in ((sick, sick, None, sick, sick, EngineClosed()), (None, sick, sick, sick)):
        watch(Patient(*states), every_s=0, tries=3, end=ends.append)  # type: ignore[arg-type]  # stands in for an engine
    assert ends == [70]


def test_a_caller_who_hangs_up_while_sending_is_no_failure_of_ours() -> None:
    async def gone() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def read(request: Request) -> Response:
        return Response(await request.body())

    request = Request({"type": "http", "method": "POST", "path": "/classify", "headers": []}, gone)
    assert asyncio.run(_answer(read, request)).status_code == CLIENT_GONE


async def _answer(handler: Handler, request: Request) -> Response:
    return await _answering(handler)(request)
