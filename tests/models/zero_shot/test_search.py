"""Search for parameters: within its ranges and budget, never below the defaults, better where it can be."""

from __future__ import annotations

from typing import Any

import pytest

from models.base import OnProgress, Progress, ignore_progress
from models.catalog import METHODS
from models.classifier_params import LATEMParams, SJEParams
from models.errors import Cancelled, Diverged, InvalidInput
from models.params import Params, SearchParams, search_space
from models.zero_shot import checkpoints
from models.zero_shot.base import create_classifier
from models.zero_shot.checkpoints import CheckpointParts
from models.zero_shot.search import SearchResult, search_params
from tests.models.zero_shot.made_up import made_up
from tests.models.zero_shot.test_checkpoints import Kept

VALIDATION = ("class 1", "class 5", "class 9")


def near(wanted: float) -> Any:
    """h grows as SJE's learning rate comes near `wanted` and features are l2-scaled."""

    def assess(params: Params, on_progress: OnProgress) -> dict[str, Any]:
        assert isinstance(params, SJEParams)
        on_progress(Progress("choosing", 1, 2))
        off = abs(params.learning_rate - wanted) / wanted
        return {"t1": 0.1, "h": 1 / (1 + off) + 0.5 * (params.normalize == "l2")}

    return assess


def save_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials here take no time, and are kept all the same."""
    monkeypatch.setattr(checkpoints, "SAVE_EVERY_S", 0.0)


def test_search_finds_what_is_better_and_keeps_what_is_fixed() -> None:
    budget = SearchParams(trials=40)
    found = search_params(SJEParams(), {"scale"}, near(0.01), budget, seed=0, on_progress=ignore_progress)
    assert isinstance(found.params, SJEParams)
    assert (found.params.normalize, found.params.scale) == ("l2", 1.0)
    assert 0.006 < found.params.learning_rate < 0.015
    first = found.trials[0]
    assert first["params"] == {"learning_rate": 0.003, "normalize": "centered"}  # the defaults
    assert len(found.trials) == 40
    assert max(trial["h"] for trial in found.trials) > first["h"] + 0.5
    assert "40 trials" in found.reason
    again = search_params(SJEParams(), {"scale"}, near(0.01), budget, seed=0, on_progress=ignore_progress)
    assert again.params == found.params
    space = search_space(SJEParams)["learning_rate"]
    assert all(space["low"] <= trial["params"]["learning_rate"] <= space["high"] for trial in found.trials)


def test_defaults_stay_where_nothing_is_better() -> None:
    found = search_params(
        LATEMParams(), set(), lambda *_: {"t1": 0.5}, SearchParams(trials=5), seed=1, on_progress=ignore_progress
    )
    assert found.params == LATEMParams()
    assert all(isinstance(trial["params"]["n_maps"], int) for trial in found.trials)


def test_budget_of_seconds_ends_it_after_the_running_trial() -> None:
    budget = SearchParams(trials=50, seconds=1e-9)
    found = search_params(SJEParams(), set(), near(0.01), budget, seed=0, on_progress=ignore_progress)
    assert len(found.trials) == 1
    assert "after 1 of 50" in found.reason


def test_a_search_that_was_broken_off_goes_on_with_the_same_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    save_each(monkeypatch)
    kept = Kept()
    calls = 0

    def assess(params: Params, on_progress: OnProgress) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise Cancelled("the worker is lost")
        report: dict[str, Any] = near(0.01)(params, on_progress)
        return report

    def search(place: Kept | None, inputs: str = "here", **changes: Any) -> SearchResult:
        budget = SearchParams(trials=12, **changes)
        return search_params(
            SJEParams(), {"scale"}, assess, budget, seed=0,
            on_progress=ignore_progress, checkpoints=place, inputs=inputs,
        )  # fmt: skip

    with pytest.raises(Cancelled):
        search(kept)
    assert len(kept.states[-1]["trials"]) == 6
    resumed = search(kept)
    assert calls == 7 + 6
    plain = search(None)
    assert [trial["params"] for trial in resumed.trials] == [trial["params"] for trial in plain.trials]
    assert (resumed.params, resumed.reason) == (plain.params, plain.reason)
    calls = 100
    assert len(search(kept).trials) == 12
    assert calls == 100  # all of it was kept
    search(kept, inputs="elsewhere")
    assert calls == 112
    kept.states[-1]["trials"] = [{**trial, "seconds": 100.0} for trial in kept.states[-1]["trials"]]
    spent = search(kept, inputs="elsewhere", seconds=250)
    assert "after 3 of 12" in spent.reason


def test_parts_of_a_job_keep_their_checkpoints_side_by_side() -> None:
    kept = Kept()
    parts = CheckpointParts(kept)
    parts.part("search").save({"trials": [1]})
    parts.part("fit").save({"runs": [2]})
    again = CheckpointParts(kept)
    assert again.part("search").load() == {"trials": [1]}
    assert again.part("fit").load() == {"runs": [2]}
    assert again.part("else").load() is None
    assert CheckpointParts(Kept([{"runs": [], "identity": "of an older version"}])).part("fit").load() is None


def test_nothing_to_search_is_an_error() -> None:
    everything = set(search_space(SJEParams))
    with pytest.raises(InvalidInput, match="nothing to search"):
        search_params(SJEParams(), everything, near(1), SearchParams(), seed=0, on_progress=ignore_progress)


def test_progress_counts_up_and_cancel_passes() -> None:
    seen: list[int] = []

    def note(progress: Progress) -> None:
        seen.append(progress.completed)
        if len(seen) == 3:
            raise Cancelled("told to")

    with pytest.raises(Cancelled):
        search_params(SJEParams(), set(), near(0.01), SearchParams(trials=9), seed=0, on_progress=note)
    assert seen == sorted(set(seen))


@pytest.mark.parametrize("method", [m for m in METHODS if m.kind == "classifier"], ids=lambda m: m.name)
def test_ranges_lie_within_bounds_and_hold_the_default(method: Any) -> None:
    defaults = method.params()
    for name, around in search_space(method.params).items():
        default = getattr(defaults, name)
        if "choices" in around:
            assert default in around["choices"]
            ends = around["choices"]
        else:
            assert around["low"] <= default <= around["high"]
            ends = (around["low"], around["high"])
        for end in ends:
            method.params.model_validate({name: end})


def test_assessing_is_what_fit_reports() -> None:
    data = made_up()
    params = SJEParams(epochs=5, learning_rate=0.01, batch_size=32)
    inputs = data.train, data.seen_embeddings
    assessed = create_classifier("sje", params).assess(*inputs, validation_classes=VALIDATION)
    fitted = create_classifier("sje", params).fit(*inputs, validation_classes=VALIDATION).validation_
    assert {**assessed, "setting": fitted["setting"]} == fitted


@pytest.mark.parametrize("metric", ["t1", "h"])
def test_what_the_folds_cannot_measure_is_searched_by_the_other_metric(metric: str) -> None:
    other = {"t1": "h", "h": "t1"}[metric]

    def assess(params: Params, on_progress: OnProgress) -> dict[str, Any]:
        return {other: near(0.01)(params, on_progress)["h"]}

    budget = SearchParams(trials=5, metric=metric)  # type: ignore[arg-type]  # one of its literals
    found = search_params(SJEParams(), set(), assess, budget, seed=0, on_progress=ignore_progress)
    best = max(found.trials, key=lambda trial: float(trial[other]))
    assert found.params == SJEParams.model_validate({**SJEParams().model_dump(), **best["params"]})
    with pytest.raises(InvalidInput, match="at least 2 validation classes") as caught:
        search_params(SJEParams(), set(), lambda *_: {}, budget, seed=0, on_progress=ignore_progress)
    assert caught.value.field == "search"


def test_a_trial_that_diverges_fails_and_the_search_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    save_each(monkeypatch)
    kept, limit = Kept(), 0.002

    def assess(params: Params, on_progress: OnProgress) -> dict[str, Any]:
        assert isinstance(params, SJEParams)
        if params.learning_rate > limit:
            raise Diverged(3, "learning_rate")
        report: dict[str, Any] = near(0.001)(params, on_progress)
        return report

    def search(assess: Any) -> SearchResult:
        budget = SearchParams(trials=8)
        return search_params(
            SJEParams(), set(), assess, budget, seed=0, on_progress=ignore_progress, checkpoints=kept
        )  # fmt: skip

    found = search(assess)
    failed = [trial for trial in found.trials if "failure" in trial]
    assert found.trials[0] in failed  # the defaults
    assert failed[0]["failure"] == "Training diverged at epoch 3; lower learning_rate."
    assert 0 < len(failed) < len(found.trials) == 8
    assert isinstance(found.params, SJEParams)
    assert found.params.learning_rate <= limit
    again = search(lambda *_: pytest.fail("all trials were kept"))
    assert (again.params, again.trials) == (found.params, found.trials)
    kept.states.clear()
    limit = 0
    with pytest.raises(InvalidInput, match="Every trial failed, the last one so: Training diverged"):
        search(assess)
