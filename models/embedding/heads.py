"""The three linear heads of VGSE's patch clustering: H (clusters), Q (classes), S (knowledge)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional


class ClusterHeads(nn.Module):
    """features (B, D) -> scores h = H(x) and assignments a = softmax(h) (B, E), Eq. 1; Q and S read a (or h).

    Features are standardised first, x = (features - centre) / scale, an affine map that H could absorb: it only
    makes one step size fit every backbone. For the same reason Q and S read E * a, whose entries are about 1, where
    those of a are about 1/E: the functions they can express are the paper's.
    """

    centre: Tensor
    scale: Tensor

    def __init__(
        self,
        centre: Tensor,
        scale: Tensor,
        *,
        n_clusters: int,
        n_classes: int,
        knowledge_dim: int,
        head_input: Literal["assignment", "logits"] = "assignment",
    ) -> None:
        super().__init__()
        self.head_input = head_input
        self.register_buffer("centre", centre)
        self.register_buffer("scale", scale)
        self.clusters = nn.Linear(len(centre), n_clusters)
        self.classes = nn.Linear(n_clusters, n_classes)
        self.knowledge = nn.Linear(n_clusters, knowledge_dim)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) -> cluster scores h (B, E), assignments a (B, E)."""
        # standardising the weights (E, D) instead of the features (B, D) gives the same scores with less memory traffic
        weight = self.clusters.weight / self.scale
        scores = functional.linear(features, weight, self.clusters.bias - weight @ self.centre)
        return scores, scores.softmax(dim=1)

    def read(self, scores: Tensor, assignments: Tensor) -> tuple[Tensor, Tensor]:
        """What Q and S make of them: class scores (B, C) and predicted knowledge (B, Dw)."""
        source = scores if self.head_input == "logits" else assignments * assignments.shape[1]
        return self.classes(source), self.knowledge(source)

    @torch.no_grad()
    def directions(self) -> Tensor:
        """The direction in features that each cluster answers to, (E, D) of length 1: rows of H."""
        return functional.normalize(self.clusters.weight / self.scale, dim=1)


def seeded_heads(
    centre: Tensor,
    scale: Tensor,
    *,
    n_clusters: int,
    n_classes: int,
    knowledge_dim: int,
    head_input: Literal["assignment", "logits"],
    seed: int,
) -> ClusterHeads:
    """Heads whose first weights depend on `seed` alone; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ClusterHeads(
            centre,
            scale,
            n_clusters=n_clusters,
            n_classes=n_classes,
            knowledge_dim=knowledge_dim,
            head_input=head_input,
        )
