"""Which classes are seen, unseen and held out for validation; which images of a class are held out for testing.

Every choice here is a fixed function of names or content and a seed: it never depends on order or on the machine.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.errors import InvalidInput, TooFewSamples

MIN_IMAGES_FOR_HOLDOUT = 5
"""Classes with fewer images than this keep them all for training."""
MIN_CLASSES_TO_VALIDATE = 4
"""Of fewer seen classes, none is held out unless it is asked for."""
ENOUGH_CLASSES = 10
"""Fewer validation classes than this tell settings apart badly: on three, T1 went down where it went up over all."""


@dataclass(frozen=True)
class ClassSplit:
    """Seen and unseen classes (disjoint), and the seen ones that are treated as unseen while choosing.

    InvalidInput names the classes that are listed twice, on both sides, or held out without being seen.
    """

    seen_classes: tuple[str, ...]
    unseen_classes: tuple[str, ...]
    validation_classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("seen_classes", "unseen_classes", "validation_classes"):
            _refuse_duplicates(getattr(self, field), field)
        if both := sorted(set(self.seen_classes) & set(self.unseen_classes)):
            raise InvalidInput(
                f"{list_names(both)}: listed both as seen and as unseen. Keep each class on one side.",
                field="unseen_classes",
            )
        if strange := sorted(set(self.validation_classes) - set(self.seen_classes)):
            raise InvalidInput(
                f"{list_names(strange)}: held out for validation, but not a seen class. "
                "Validation classes are chosen among the seen ones.",
                field="validation_classes",
            )
        if not self.training_classes:
            raise TooFewSamples(
                "No seen class is left to train on. Give at least one that is not a validation class.",
                field="validation_classes" if self.seen_classes else "seen_classes",
            )

    @property
    def training_classes(self) -> tuple[str, ...]:
        """The seen classes that are not held out."""
        held_out = set(self.validation_classes)
        return tuple(name for name in self.seen_classes if name not in held_out)


def choose_validation_classes(seen_classes: Sequence[str], *, fraction: float = 0.2, seed: int = 0) -> tuple[str, ...]:
    """About `fraction` of the seen classes, sorted: at least one, leaving at least two where there are three or more.

    The choice ranks the classes by a hash of seed and name, so their order does not matter and one class more
    moves few others. TooFewSamples for fewer than two classes.
    """
    if not 0 < fraction < 1:
        raise InvalidInput(f"The fraction of validation classes is {fraction}; it must lie between 0 and 1.")
    ranked = _ranked(seen_classes, seed)
    if len(ranked) < 2:
        raise TooFewSamples(
            f"{len(ranked)} seen class cannot be divided into training and validation classes. "
            "Give at least two seen classes, or choose nothing on validation classes."
        )
    n_kept = 2 if len(ranked) > 2 else 1
    n_chosen = min(max(round(fraction * len(ranked)), 1), len(ranked) - n_kept)
    return tuple(sorted(ranked[:n_chosen]))


def validation_classes(
    seen_classes: Sequence[str], asked: Sequence[str] | None, earlier: Iterable[Sequence[str]] = (), *, seed: int
) -> tuple[str, ...]:
    """As `asked` for; else the first of the `earlier` choices that names seen classes and leaves two; else by the seed.

    Of fewer than four seen classes the seed chooses none.
    """
    if asked is not None:
        return tuple(asked)
    seen = set(seen_classes)
    for names in earlier:
        used = tuple(name for name in names if name in seen)
        if used and len(seen) - len(used) >= 2:
            return used
    return choose_validation_classes(seen_classes, seed=seed) if len(seen) >= MIN_CLASSES_TO_VALIDATE else ()


def group_count(n_classes: int, n_first: int) -> int:
    """Groups of about `n_first` classes that `n_classes` make, the first ones among them; 1 where `n_first` is 0."""
    return 1 + max(1, round((n_classes - n_first) / n_first)) if n_first else 1


def fold_count(asked: int, n_classes: int, n_first: int) -> int:
    """Groups that take turns as validation classes: as many as `asked` for, and no more than there are.

    n_first: classes of the first group. asked 0: as many as let 10 classes take a turn.
    """
    enough = -(-ENOUGH_CLASSES // max(1, n_first))
    return min(asked or enough, group_count(n_classes, n_first))


def assign_holdout(sha256s: Sequence[str], fraction: float) -> NDArray[np.bool_]:
    """Which images of *one* class are held out for testing: (n_images,), True where held out.

    An image's place depends on its own content hash alone, so it stays when others come or go. Two exceptions keep a
    class trainable: fewer than five images are all kept, and so is the last one if the rule would take every one.
    """
    if not 0 <= fraction < 1:
        raise InvalidInput(f"The held-out fraction is {fraction}; it must be at least 0 and less than 1.")
    places = np.array([_place(sha) for sha in sha256s], dtype=np.float64)
    held_out = places < fraction
    if len(places) < MIN_IMAGES_FOR_HOLDOUT:
        held_out[:] = False
    elif held_out.all():
        held_out[places.argmax()] = False
    return held_out


def list_names(names: Iterable[str], n_shown: int = 10) -> str:
    """Names for an error message: quoted, the first ten, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - n_shown} more" if len(listed) > n_shown else ""
    return ", ".join(repr(name) for name in listed[:n_shown]) + more


def _place(sha256: str) -> float:
    """A content hash as a number in [0, 1). 13 hex digits: what a float64 holds exactly."""
    try:
        return int(sha256[:13], 16) / float(16 ** len(sha256[:13]))
    except ValueError:
        raise InvalidInput(f"{sha256!r} is not a SHA-256 in hexadecimal.") from None


def _ranked(names: Sequence[str], seed: int) -> list[str]:
    _refuse_duplicates(names, "seen_classes")
    return sorted(
        sorted(names), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest()
    )


def _refuse_duplicates(names: Sequence[str], field: str) -> None:
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise InvalidInput(f"{list_names(twice)}: listed more than once in {field}. List each class once.", field=field)
