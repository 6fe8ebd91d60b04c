"""The four losses of VGSE's patch clustering (CVPR 2022, Eq. 2-6). Letters: B patches, E clusters, C classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LOG_FLOOR = 1e-8
SQRT_FLOOR = 1e-12


def neighbour_loss(assignments: Tensor, neighbour_assignments: Tensor) -> Tensor:
    """L_clu (Eq. 2): -mean log(a_i . a_j + 1e-8) over anchors (B, E) and one sampled neighbour each (B, E)."""
    agreement = torch.linalg.vecdot(assignments, neighbour_assignments)
    loss: Tensor = -(agreement + LOG_FLOOR).log().mean()
    return loss


def entropy_loss(assignments: Tensor) -> Tensor:
    """L_pel (Eq. 3): minus the entropy of the batch's mean assignment (B, E); least when all clusters are used."""
    usage = assignments.mean(dim=0)  # (E,)
    loss: Tensor = torch.special.xlogy(usage, usage.clamp_min(LOG_FLOOR)).sum()
    return loss


def class_loss(logits: Tensor, labels: Tensor, *, double_softmax: bool = False) -> Tensor:
    """L_cls (Eq. 4): cross-entropy of the class head's scores (B, C) against labels (B,).

    `double_softmax` takes the softmax of the probabilities once more, as Eq. 4 is printed.
    """
    return functional.cross_entropy(logits.softmax(dim=1) if double_softmax else logits, labels)


def semantic_loss(predicted: Tensor, knowledge: Tensor, *, squared: bool = False) -> Tensor:
    """L_sem (Eq. 5): mean distance (or squared distance) of predictions (B, Dw) to their class's knowledge (B, Dw)."""
    distances = (predicted - knowledge).square().sum(dim=1)
    return distances.mean() if squared else (distances + SQRT_FLOOR).sqrt().mean()
