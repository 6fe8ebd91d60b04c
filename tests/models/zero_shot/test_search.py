"""Search for parameters: within its ranges and budget, never below the defaults, better where it can be."""

from __future__ import annotations

from typing import Any

import pytest

from models.base import OnProgress, Progress, ignore_progress
from models.catalog import METHODS
from models.classifier_params import LATEMParams, SJEParams
from models.errors import Cancelled, InvalidInput
from models.params import Params, SearchParams, search_space
from models.zero_shot.base import create_classifier
from models.zero_shot.search import search_params
from tests.models.zero_shot.made_up import made_up

VALIDATION = ("class 1", "class 5", "class 9")


def near(wanted: float) -> Any:
    """h grows as SJE's learning rate comes near `wanted` and features are l2-scaled."""

    def assess(params: Params, on_progress: OnProgress) -> dict[str, Any]:
        assert isinstance(params, SJEParams)
        on_progress(Progress("choosing", 1, 2))
        off = abs(params.learning_rate - wanted) / wanted
        return {"t1": 0.1, "h": 1 / (1 + off) + 0.5 * (params.normalize == "l2")}

    return assess


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
