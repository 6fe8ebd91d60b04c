"""How much memory training a classifier takes, before it begins. No torch: the API refuses what cannot fit.

What counts are the features, in float32: images x numbers of an image x 4 bytes, as often as they are held at once.
A feature map has as many numbers as it has places times channels, some fifty times a pooled vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from models.backbone_names import MAP_SIDES, NETWORKS
from models.data.splits import fold_count

PROCESS_BYTES = 1_500_000_000
"""What a worker holds beside the features: libraries, a network, a batch."""


def numbers_per_image(network: str, size: int, *, is_spatial: bool) -> int:
    """Numbers of the features of an image of `size` pixels a side; of a map rounded up to whole places."""
    pooled, channels, stride = NETWORKS[network]
    side = MAP_SIDES.get(network) or ceil(size / stride)
    return side**2 * channels if is_spatial else pooled


def training_bytes(
    params: Mapping[str, Any], n_train: int, n_test: int, numbers: int, *, n_seen: int, n_validation: int
) -> int:
    """The most bytes that training with the method's `params` holds, for features of `numbers` numbers an image.

    n_seen, n_validation: seen classes, and those of them that stand for unseen ones first.
    Training rows lie there as they came, once for each fold whose trials stand side by side, and once more while they
    are scaled; test rows as they came, and twice more when they are scored, by when the folds are gone.
    """
    folds = fold_count(params.get("folds", 1), n_seen, n_validation)
    is_scaled = params.get("normalize") != "none"
    choosing = n_train * (1 + folds + is_scaled) + n_test
    scoring = n_train + 3 * n_test
    return PROCESS_BYTES + 4 * numbers * max(choosing, scoring)


def refusal(n_images: int, numbers: int, needed: int, have: int) -> str:
    """What to say where a worker's memory of `have` bytes does not hold the `needed` ones."""
    return (
        f"Training would hold about {needed / 1e9:,.1f} GB in memory ({n_images:,} images of {numbers:,} numbers), and "
        f"a worker has {have / 1e9:,.1f} GB. Use fewer images, a smaller image_size, a network with smaller features, "
        "fewer folds, or a method on pooled features; or a larger machine."
    )
