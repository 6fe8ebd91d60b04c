"""What can go wrong in `models`. No torch here: the API process imports this file.

ModelError
├── InvalidInput            the caller's data or parameters; says what to do
│   ├── UnknownName         no such method, parameter, class; offers the nearest valid one
│   ├── ShapeMismatch       two arrays disagree; quotes both shapes
│   ├── MissingKnowledge    class names that the knowledge source does not resolve
│   ├── TooFewSamples       fewer images, classes or patches than the method needs
│   └── Diverged            a step size with which a training leaves the finite numbers
├── UnreadableImage         one file that is no usable image; skipped and reported, never fatal
├── NotFitted               asked before `fit`
├── OutOfDeviceMemory       a training step does not fit the device, however small its batch
└── Cancelled               raised by a progress callback to stop the work
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

EXTRA = ".venv/bin/pip install -e '.[{}]' -c constraints.txt"
"""How a checkout gets an extra of pyproject.toml."""
MAX_LISTED = 50  # more than there are methods of a kind; networks are more


class ModelError(Exception):
    """Base of every error that `models` raises on purpose."""


class InvalidInput(ModelError, ValueError):
    """Something the caller gave cannot be used.

    `field` names where (a JSON-pointer-like path such as ``params/clustering/n_clusters``), if known.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class UnknownName(InvalidInput):
    """A name outside a closed list; the message offers the nearest valid ones."""

    def __init__(self, kind: str, name: str, valid: Iterable[str], *, field: str | None = None) -> None:
        self.valid = sorted(valid)
        self.nearest = nearest_names(name, self.valid)
        hint = f"Did you mean {_join(self.nearest)}?" if self.nearest else f"Valid: {_some(self.valid)}."
        super().__init__(f"Unknown {kind} {name!r}. {hint}", field=field)


class ShapeMismatch(InvalidInput):
    """Two arrays that must agree do not."""


class MissingKnowledge(InvalidInput):
    """Class names without a vector. `suggestions` maps each name to near entries of the source."""

    def __init__(
        self, names: Sequence[str], suggestions: Mapping[str, Sequence[str]] | None = None, *, field: str | None = None
    ) -> None:
        self.names = list(names)
        self.suggestions = {name: list((suggestions or {}).get(name, ())) for name in names}
        shown = "; ".join(
            f"{name!r}" + (f" (near: {_join(near)})" if (near := self.suggestions[name]) else "") for name in names[:10]
        )
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        super().__init__(
            f"The knowledge source has no vector for {shown}{more}. Rename the classes or add vectors for them.",
            field=field,
        )


class TooFewSamples(InvalidInput):
    """Fewer images, classes or patches than the method needs."""


class Diverged(InvalidInput):
    """A training left the finite numbers: its step size is too large for these inputs."""

    def __init__(self, epoch: int, rate: str) -> None:
        super().__init__(f"Training diverged at epoch {epoch}; lower {rate}.", field=f"params/{rate}")


class UnreadableImage(ModelError):
    """One file that cannot be used as an image. `reason` is one sentence for its owner."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NotFitted(ModelError):
    """A fitted model was needed; call `fit` or `load` first."""


class OutOfDeviceMemory(ModelError, MemoryError):
    """The device's memory is too small for a step of training, and batches cannot get smaller."""


class Cancelled(ModelError):
    """The work was told to stop; nothing partial may be published."""


def nearest_names(name: str, valid: Sequence[str], n: int = 3) -> list[str]:
    """Up to `n` entries of `valid` that are spelled most like `name`."""
    folded = {v.casefold(): v for v in valid}
    return [folded[match] for match in difflib.get_close_matches(name.casefold(), list(folded), n=n, cutoff=0.6)]


def _join(names: Sequence[str]) -> str:
    return ", ".join(repr(n) for n in names)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return _join(names[:MAX_LISTED]) + more
