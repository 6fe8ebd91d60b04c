"""What became of the clusters: how evenly they are used, which are dead, whether all collapsed into a few."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from models.base import FloatArray, IntArray

DEAD_SHARE = 0.05
COLLAPSED_SHARE = 0.1


@dataclass(frozen=True)
class ClusterReport:
    """usage: mean assignment of each cluster, summing to 1. patches: how many it is the first choice of.

    entropy: of the usage, in nats (at most log n_clusters). effective_clusters: its exponential.
    dead: clusters that are no patch's first choice and get under a twentieth of an even share.
    collapsed: under a tenth of the clusters carry the usage; `summary` says it in a sentence.
    notes: what the fit had to change or wants known.
    """

    usage: tuple[float, ...]
    patches: tuple[int, ...]
    entropy: float
    effective_clusters: float
    dead: tuple[int, ...]
    collapsed: bool
    summary: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> ClusterReport:
        lists = {name: tuple(stored[name]) for name in ("usage", "patches", "dead", "notes")}
        return cls(**{**stored, **lists})


def cluster_report(usage: FloatArray, patches: IntArray, notes: tuple[str, ...] = ()) -> ClusterReport:
    """Judges `usage` (E,) and `patches` (E,), the first-choice counts."""
    n_clusters = len(usage)
    positive = usage[usage > 0]
    entropy = float(-(positive * np.log(positive)).sum())
    effective = math.exp(entropy)
    dead = np.flatnonzero((patches == 0) & (usage < DEAD_SHARE / n_clusters))
    # two clusters are as few as there can be: those are collapsed only when one of them takes all
    collapsed = effective < max(COLLAPSED_SHARE * n_clusters, 1.2)
    return ClusterReport(
        usage=tuple(float(share) for share in usage),
        patches=tuple(int(count) for count in patches),
        entropy=entropy,
        effective_clusters=effective,
        dead=tuple(int(cluster) for cluster in dead),
        collapsed=collapsed,
        summary=_summary(n_clusters, effective, len(dead), collapsed),
        notes=notes,
    )


def _summary(n_clusters: int, effective: float, n_dead: int, collapsed: bool) -> str:
    if collapsed:
        return (
            f"The clusters collapsed: only about {effective:.0f} of {n_clusters} are used. "
            "Raise entropy_weight or batch_size, or ask for fewer clusters."
        )
    if n_dead:
        return f"{n_dead} of {n_clusters} clusters are dead: no patch chooses them. Ask for fewer clusters."
    return f"All {n_clusters} clusters are used, as evenly as {effective:.0f} equal ones would be."
