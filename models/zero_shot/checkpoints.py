"""What a training keeps after its epochs, so that another process can go on from there to the same bits.

A fit trains several times: each fold's search, each fold's calibration, all seen classes. The tape holds these runs in
their order, which the inputs decide: what those that ended left behind, and where the last one stands.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

State = dict[str, Any]
SAVE_EVERY_S = 5.0
"""At least this long between two savings: writing takes time, too."""


class Checkpoints(Protocol):
    """Where checkpoints lie; `load` gives the newest, None where there is none that can be read."""

    def load(self) -> State | None:
        """The newest state."""
        ...

    def save(self, state: State) -> None:
        """Replace it."""
        ...


class Stateful(Protocol):
    """Networks, optimizers, sources of chance and of batches."""

    def state_dict(self) -> State:
        """All that decides what comes next."""
        ...

    def load_state_dict(self, state_dict: State) -> Any:
        """Take it back."""
        ...


def digest(about: str, *arrays: np.ndarray[Any, Any]) -> str:
    """What tells these inputs from others: `about` them, and the arrays with their shapes."""
    found = hashlib.sha256(about.encode())
    for array in arrays:
        found.update(f"{array.shape}".encode() + np.ascontiguousarray(array).data)
    return found.hexdigest()


class FileCheckpoints:
    """A file, replaced as a whole. Its content is read as plain tensors and numbers; code in it is never run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> State | None:
        """The state in the file; a damaged one counts as none."""
        try:
            state: State = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception:  # torch raises a dozen kinds; training anew is right after any of them
            return None
        return state

    def save(self, state: State) -> None:
        """Written beside, then renamed."""
        part = self.path.with_suffix(".part")
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)


class CheckpointParts:
    """One place of checkpoints for several parts of a job, which follow each other; each finds its own again."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._states: State = (checkpoints.load() or {}).get("parts", {})

    def part(self, name: str) -> Checkpoints:
        """The checkpoints of the part of that name; what the others have kept stays beside."""
        return _Part(self, name)

    def load(self, name: str) -> State | None:
        """What the part kept last."""
        state: State | None = self._states.get(name)
        return state

    def save(self, name: str, state: State) -> None:
        """Replaces it; all parts are written."""
        self._states[name] = state
        self._checkpoints.save({"parts": self._states})


@dataclass(frozen=True)
class _Part:
    """A part's checkpoints."""

    all: CheckpointParts
    name: str

    def load(self) -> State | None:
        return self.all.load(self.name)

    def save(self, state: State) -> None:
        self.all.save(self.name, state)


class Keeper:
    """Checkpoints of the inputs that `identity` tells from others, whose are not taken up; saved now and then."""

    def __init__(
        self, checkpoints: Checkpoints | None, identity: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._checkpoints, self._identity, self._clock = checkpoints, identity, clock
        self._saved_at = clock()

    def load(self) -> State:
        """What was kept of the same inputs; empty where there is nothing."""
        saved = self._checkpoints.load() if self._checkpoints is not None else None
        return saved if saved is not None and saved.get("identity") == self._identity else {}

    @property
    def is_keeping(self) -> bool:
        """Whether there is a place to save to."""
        return self._checkpoints is not None

    @property
    def is_due(self) -> bool:
        """Whether there is one, and it is time."""
        return self.is_keeping and self._clock() - self._saved_at >= SAVE_EVERY_S

    def save(self, **state: Any) -> None:
        """Replaces what was kept."""
        if self._checkpoints is not None:
            self._checkpoints.save({"identity": self._identity, **state})
            self._saved_at = self._clock()


class Chance:
    """A random generator with the interface of the other parts."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def state_dict(self) -> State:
        """Where it stands."""
        return {"state": self._generator.get_state()}

    def load_state_dict(self, state_dict: State) -> None:
        """Put it back there."""
        self._generator.set_state(state_dict["state"].cpu().to(torch.uint8))


class Tape:
    """The runs of one fit. `identity` tells inputs and parameters apart: a tape of others is not played."""

    def __init__(
        self, checkpoints: Checkpoints | None, identity: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._keeper = Keeper(checkpoints, identity, clock=clock)
        self._next = 0
        self._runs: list[State] = self._keeper.load().get("runs", [])

    def begin(self) -> Run:
        """The next run, from where it was left."""
        if self._next == len(self._runs):
            self._runs.append({})
        self._next += 1
        return Run(self, self._next - 1, self._runs[self._next - 1])

    def put(self, number: int, state: Callable[[], State], *, is_end: bool) -> None:
        """Keep a run's state where it ended, or where it is time to save."""
        if self._keeper.is_due or (is_end and self._keeper.is_keeping):
            self._runs[number] = state()
        if self._keeper.is_due:
            self._keeper.save(runs=self._runs[: number + 1])


class Run:
    """One training: `history`, one dict an epoch so far; `network`, its weights if it `is_done`; `kept`, snapshots."""

    def __init__(self, tape: Tape, number: int, saved: State) -> None:
        self._tape, self._number, self._saved = tape, number, saved
        self._parts: dict[str, Stateful] = {}
        self._is_resumable = False
        self.history: list[dict[str, float]] = list(saved.get("history", ()))
        self.kept: dict[int, dict[str, Tensor]] = dict(saved.get("kept", {}))
        self.network: dict[str, Tensor] = saved.get("network", {})

    @property
    def is_done(self) -> bool:
        """Whether it ended before."""
        return bool(self._saved.get("done"))

    def add(self, **parts: Stateful) -> None:
        """Parts whose state belongs to the run."""
        self._parts |= parts

    def resume(self, **parts: Stateful) -> None:
        """Call before the first epoch, with all remaining parts: they take on the state they were left in."""
        self.add(**parts)
        self._is_resumable = True
        for name, state in self._saved.get("parts", {}).items():
            self._parts[name].load_state_dict(state)

    def record(self, entry: dict[str, float]) -> None:
        """After each epoch but the last."""
        self.history.append(entry)
        if self._is_resumable:
            self._tape.put(self._number, self._state, is_end=False)

    def end(self, network: dict[str, Tensor]) -> None:
        """After the last one."""
        done = {"done": True, "history": self.history, "kept": self.kept, "network": network}
        self._tape.put(self._number, lambda: done, is_end=True)

    def _state(self) -> State:
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        return {"history": list(self.history), "kept": dict(self.kept), "parts": parts}
