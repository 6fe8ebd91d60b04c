"""One epoch of VGSE's patch clustering (Eq. 6), on cached features or through a trainable backbone alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.embedding.heads import ClusterHeads
from models.embedding.losses import class_loss, entropy_loss, neighbour_loss, semantic_loss
from models.embedding.neighbours import NeighbourLists
from models.embedding.rows import FeatureRows, blocks
from models.params import ClusteringParams

LOSS_NAMES = ("loss", "neighbour", "entropy", "class", "semantic")


@dataclass(frozen=True)
class PatchSet:
    """Patches to train on. classes: (P,) of 0..C-1; images: (P,) of 0..N-1; knowledge: (C, Dw)."""

    features: FeatureRows
    classes: Tensor
    images: Tensor
    neighbours: NeighbourLists
    knowledge: Tensor

    def __len__(self) -> int:
        return len(self.features)

    @property
    def n_classes(self) -> int:
        return len(self.knowledge)


def train_epoch(
    heads: ClusterHeads,
    patches: PatchSet,
    params: ClusteringParams,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> dict[str, float]:
    """One pass over all patches in a random order; returns the mean of each loss."""
    device = patches.classes.device
    heads.train()
    n_steps = max(1, round(len(patches) / params.batch_size))
    order = torch.randperm(len(patches), generator=generator, device=generator.device).to(device)
    sums = torch.zeros(len(LOSS_NAMES), device=device)  # added up on the device: no wait for it at each step
    for anchors in torch.tensor_split(order, n_steps):
        losses = _losses(heads, patches, anchors, patches.neighbours.sample(anchors, generator), params)
        optimizer.zero_grad(set_to_none=True)
        losses[0].backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        optimizer.step()
        sums += losses.detach()
    return dict(zip(LOSS_NAMES, (sums / n_steps).tolist(), strict=True))


def _losses(
    heads: ClusterHeads, patches: PatchSet, anchors: Tensor, neighbours: Tensor, params: ClusteringParams
) -> Tensor:
    """(5,): the total of Eq. 6, then its parts in the order of LOSS_NAMES."""
    scores, assignments = heads(patches.features.rows(torch.cat([anchors, neighbours])))
    own, other = assignments.split([len(anchors), len(neighbours)])
    labels = patches.classes[anchors]
    class_scores, predicted = heads.read(scores[: len(anchors)], own)
    parts = torch.stack(
        [
            neighbour_loss(own, other),
            entropy_loss(own),
            class_loss(class_scores, labels, double_softmax=params.double_softmax),
            semantic_loss(predicted, patches.knowledge[labels], squared=params.squared_semantic),
        ]
    )
    weights = parts.new_tensor([1.0, params.entropy_weight, params.class_weight, params.semantic_weight])
    return torch.cat([(parts @ weights)[None], parts])


@torch.inference_mode()
def class_means(heads: ClusterHeads, patches: PatchSet) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 7-8 in one pass: (C, E) mean over a class's images of the mean over an image's patches.

    Also (E,) mean assignment of all patches, and (E,) patches whose largest assignment is the cluster.
    """
    heads.eval()
    device = patches.classes.device
    n_clusters = heads.clusters.out_features
    per_image = torch.bincount(patches.images)
    image_class = torch.full_like(per_image, -1)
    image_class[patches.images] = patches.classes
    per_class = torch.bincount(image_class[image_class >= 0], minlength=patches.n_classes)
    means = torch.zeros(patches.n_classes, n_clusters, dtype=torch.float64, device=device)
    usage = torch.zeros(n_clusters, dtype=torch.float64, device=device)
    winners = torch.zeros(n_clusters, dtype=torch.int64, device=device)
    for block in blocks(len(patches)):
        rows = torch.arange(block.start, block.stop, device=device)
        _, assignments = heads(patches.features.rows(rows))
        classes = patches.classes[block]
        weight = 1 / (per_image[patches.images[block]].double() * per_class[classes])
        means.index_add_(0, classes, assignments * weight[:, None])
        usage += assignments.sum(dim=0)
        winners += torch.bincount(assignments.argmax(dim=1), minlength=n_clusters)
    return means.float(), (usage / len(patches)).float(), winners
