"""Search for the parameters of a classifier that matter, within a budget, on seen classes treated as unseen.

Tree-structured Parzen estimators (Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011), by
Optuna. The first trial is the defaults, so that the search never ends below them on what it measures. Finished trials
are kept: a search that was broken off tells the sampler of them again, in their order, and goes on as if it had not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.base import OnProgress, Progress
from models.errors import Diverged, InvalidInput
from models.params import Params, SearchParams, search_space
from models.zero_shot.checkpoints import Checkpoints, Keeper

Assess = Callable[[Params, OnProgress], Mapping[str, Any]]
"""(parameters, on_progress) -> what was measured on validation classes, `t1` and `h` among it."""


@dataclass(frozen=True)
class SearchResult:
    """The best parameters, all trials (what was set, t1, h or a failure, seconds) in order, and why it ended."""

    params: Params
    trials: list[dict[str, Any]]
    reason: str


def search_params(
    base: Params,
    fixed: set[str],
    assess: Assess,
    budget: SearchParams,
    *,
    seed: int,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None = None,
    inputs: str = "",
) -> SearchResult:
    """The best of `base` with parameters changed; those named in `fixed` stay.

    checkpoints: where finished trials are kept; their seconds count for the budget. inputs: what tells the data of
    `assess` from others, so that trials on others are not taken up.
    A training that diverges is a failed trial. Raises InvalidInput where the method has nothing to search, or all of it
    is fixed, where every trial failed, and where nothing can be measured on the validation classes.
    """
    space = {name: around for name, around in search_space(type(base)).items() if name not in fixed}
    if not space:
        raise InvalidInput(
            "There is nothing to search: the method chooses its settings by itself, or `params` gives them all.",
            field="search",
        )
    study = _study(seed)
    study.enqueue_trial({name: getattr(base, name) for name in space}, skip_if_exists=True)
    identity = f"{base!r} {sorted(fixed)} {budget.metric} {seed} {inputs}"
    kept = _FinishedTrials(checkpoints, identity)
    trials: list[dict[str, Any]] = []
    best, best_value, reason = base, -np.inf, f"All {budget.trials} trials were made."
    for number in range(budget.trials):
        trial = study.ask()
        chosen = {name: _suggest(trial, name, around) for name, around in space.items()}
        params = type(base).model_validate({**base.model_dump(), **chosen})
        found = kept.take(number, chosen)
        if found is None:
            before = time.monotonic()
            measured = _measured(assess, params, _trial_progress(on_progress, number, budget.trials))
            found = {"params": chosen, **measured, "seconds": time.monotonic() - before}
        trials.append(found)
        kept.save(trials)
        value = _value(found, budget.metric)
        study.tell(trial, value)  # a failure is told as 0, so that the sampler keeps away from there
        if "failure" not in found and value > best_value:
            best, best_value = params, value
        if sum(done["seconds"] for done in trials) > budget.seconds:
            reason = f"The budget of {budget.seconds:g} s was spent after {number + 1} of {budget.trials} trials."
            break
    if best_value == -np.inf:
        raise InvalidInput(f"Every trial failed, the last one so: {trials[-1]['failure']}", field="search")
    return SearchResult(best, [{**trial, "seconds": round(trial["seconds"], 2)} for trial in trials], reason)


def _measured(assess: Assess, params: Params, on_progress: OnProgress) -> dict[str, Any]:
    """t1 and h, as far as there are any; the `failure` of a training that diverges."""
    try:
        report = assess(params, on_progress)
    except Diverged as error:
        return {"failure": str(error)}
    measured = {name: float(report[name]) for name in ("t1", "h") if name in report}
    if not measured:
        raise InvalidInput(
            "Validation classes one at a time, without images of seen classes to spare, measure nothing to search by. "
            "Name at least 2 validation classes, or give classes more images.",
            field="search",
        )
    return measured


def _value(found: Mapping[str, Any], metric: str) -> float:
    """The metric of a trial; the other one where the folds do not let it be measured; 0 of a failure."""
    return next((float(found[name]) for name in (metric, "t1", "h") if name in found), 0.0)


class _FinishedTrials:
    """Trials of an earlier attempt at the same search, and where those of this one are kept."""

    def __init__(self, checkpoints: Checkpoints | None, identity: str) -> None:
        self._keeper = Keeper(checkpoints, identity)
        self._earlier: list[dict[str, Any]] = self._keeper.load().get("trials", [])

    def take(self, number: int, chosen: Mapping[str, Any]) -> dict[str, Any] | None:
        """The earlier trial of that number, if it was one of the same parameters; after one that was not, no more."""
        if number < len(self._earlier) and self._earlier[number]["params"] == chosen:
            return dict(self._earlier[number])
        self._earlier = self._earlier[:number]
        return None

    def save(self, trials: list[dict[str, Any]]) -> None:
        """Keep what is done so far; not each time where trials are short."""
        if len(trials) > len(self._earlier) and self._keeper.is_due:
            self._keeper.save(trials=trials)


def _study(seed: int) -> Any:
    import optuna  # most jobs never search, and it takes half a second

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))


def _suggest(trial: Any, name: str, around: Mapping[str, Any]) -> Any:
    if "choices" in around:
        return trial.suggest_categorical(name, around["choices"])
    low, high, log = around["low"], around["high"], around["log"]
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, log=log)
    return trial.suggest_float(name, low, high, log=log)


def _trial_progress(on_progress: OnProgress, number: int, n_trials: int) -> OnProgress:
    """A trial's reports as parts of one phase; they are where a job is cancelled."""

    def report(progress: Progress) -> None:
        share = progress.completed / progress.total if progress.total else 0.0
        done = round(100 * (number + min(share, 1.0) * 0.99))
        on_progress(Progress("search", done, 100 * n_trials, note=progress.note))

    return report
