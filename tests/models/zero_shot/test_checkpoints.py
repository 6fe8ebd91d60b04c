"""Training that is broken off anywhere goes on to the same bits."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.base import FloatArray, Progress
from models.catalog import METHODS
from models.errors import Cancelled
from models.params import Params
from models.zero_shot import checkpoints as module
from models.zero_shot.base import ZeroShotModel, create_classifier
from models.zero_shot.checkpoints import Chance, FileCheckpoints, State, Tape
from tests.models.test_contract import DATA, VALIDATION, brief, quick

EVERY_S = module.SAVE_EVERY_S
METHODS_WITH_EPOCHS = [m.name for m in METHODS if m.kind == "classifier" and "epochs" in m.params.model_fields]


class Kept:
    """Checkpoints in memory; every one is kept."""

    def __init__(self, states: list[State] | None = None) -> None:
        self.states = states or []

    def load(self) -> State | None:
        return copy.deepcopy(self.states[-1]) if self.states else None

    def save(self, state: State) -> None:
        self.states.append(copy.deepcopy(state))


@pytest.fixture(autouse=True)
def save_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY_S", 0.0)


def fit(name: str, params: Params, kept: Any, stop_after: int | None = None) -> tuple[ZeroShotModel, int]:
    """The model, and how many epochs were reported; broken off after `stop_after` of them."""
    reports = 0

    def count(progress: Progress) -> None:
        nonlocal reports
        reports += progress.phase in ("choosing", "calibrating", "training")
        if reports == stop_after:
            raise Cancelled("the worker is lost")

    model = create_classifier(name, params)
    with suppress(Cancelled):
        model.fit(DATA.train, DATA.seen_embeddings, validation_classes=VALIDATION, on_progress=count, checkpoints=kept)
    return model, reports


@pytest.mark.parametrize("name", METHODS_WITH_EPOCHS)
def test_a_lost_training_goes_on_to_the_same_bits(name: str) -> None:
    params = brief(name).model_copy(update={"epochs": 6})
    if "steps_per_epoch" not in type(params).model_fields:
        params = params.model_copy(update={"folds": 2})
    plain, n_reports = fit(name, params, None)
    everything = np.concatenate([DATA.seen_embeddings, DATA.unseen_embeddings])
    features = DATA.unseen.features
    for share in (0.3, 0.9):
        kept = Kept()
        fit(name, params, kept, stop_after=max(2, round(share * n_reports)))
        resumed, n_left = fit(name, params, kept)
        assert n_left <= n_reports
        assert np.array_equal(resumed.scores(features, everything), plain.scores(features, everything))
        assert (resumed.history_, resumed.validation_) == (plain.history_, plain.validation_)
        assert (resumed.gamma_, resumed.temperature_) == (plain.gamma_, plain.temperature_)
    assert kept.states
    assert n_left < n_reports


def test_checkpoints_of_other_inputs_or_parameters_are_not_used() -> None:
    params = quick("sje")
    kept = Kept()
    fit("sje", params, kept, stop_after=20)
    other = params.model_copy(update={"learning_rate": 0.02})
    plain, _ = fit("sje", other, None)
    mixed, _ = fit("sje", other, kept)
    assert np.array_equal(
        mixed.scores(DATA.unseen.features, DATA.unseen_embeddings),
        plain.scores(DATA.unseen.features, DATA.unseen_embeddings),
    )


def test_checkpoints_know_the_validation_classes_own_embeddings() -> None:
    params, kept = quick("sje").model_copy(update={"epochs": 2}), Kept()
    turned = DATA.seen_embeddings.copy()
    turned[[1, 5, 9]] = turned[[5, 9, 1]]

    def scores(embeddings: FloatArray, kept: Kept | None) -> FloatArray:
        model = create_classifier("sje", params).fit(
            DATA.train,
            embeddings,
            validation_classes=VALIDATION,
            validation_embeddings=DATA.seen_embeddings[[1, 5, 9]],
            checkpoints=kept,
        )
        return model.scores(DATA.unseen.features, DATA.unseen_embeddings)

    first = scores(DATA.seen_embeddings, kept)
    assert not np.array_equal(scores(turned, kept), first)
    assert np.array_equal(scores(turned, kept), scores(turned, None))


def test_a_file_comes_back_whole_or_counts_as_none(tmp_path: Path) -> None:
    store = FileCheckpoints(tmp_path / "checkpoint.pt")
    assert store.load() is None
    store.save({"runs": [{"history": [{"loss": 0.5}], "parts": {"a": {"w": torch.arange(3)}}}], "identity": "x"})
    found = store.load()
    assert found is not None
    assert found["runs"][0]["parts"]["a"]["w"].tolist() == [0, 1, 2]
    data = store.path.read_bytes()
    store.path.write_bytes(data[: len(data) // 2])
    assert store.load() is None

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"runs": Evil()}, store.path)
    assert store.load() is None
    assert not (tmp_path / "owned").exists()


def test_saving_waits_for_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY_S", EVERY_S)
    now = 0.0
    kept = Kept()
    tape = Tape(kept, "x", clock=lambda: now)
    run = tape.begin()
    run.resume(chance=Chance(torch.Generator()))
    for second in range(12):
        now = float(second)
        run.record({"epoch": float(second)})
    assert [len(state["runs"][0]["history"]) for state in kept.states] == [6, 11]
    assert EVERY_S > 0
