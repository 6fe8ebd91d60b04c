"""How much memory training a classifier takes, before it begins. No torch: the API refuses what cannot fit.

What counts are the features, in float32: images x numbers of an image x 4 bytes, as often as they are held at once.
A feature map has as many numbers as it has places times channels, some fifty times a pooled vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from models.data.splits import fold_count

NETWORKS: dict[str, tuple[int, int, int]] = {
    "alexnet": (4096, 256, 38),
    "convnext_base": (1024, 1024, 32),
    "convnext_large": (1536, 1536, 32),
    "convnext_small": (768, 768, 32),
    "convnext_tiny": (768, 768, 32),
    "densenet121": (1024, 1024, 32),
    "densenet161": (2208, 2208, 32),
    "densenet169": (1664, 1664, 32),
    "densenet201": (1920, 1920, 32),
    "efficientnet_b0": (1280, 1280, 32),
    "efficientnet_b1": (1280, 1280, 32),
    "efficientnet_b2": (1408, 1408, 32),
    "efficientnet_b3": (1536, 1536, 32),
    "efficientnet_b4": (1792, 1792, 32),
    "efficientnet_b5": (2048, 2048, 32),
    "efficientnet_b6": (2304, 2304, 32),
    "efficientnet_b7": (2560, 2560, 32),
    "efficientnet_v2_l": (1280, 1280, 32),
    "efficientnet_v2_m": (1280, 1280, 32),
    "efficientnet_v2_s": (1280, 1280, 32),
    "googlenet": (1024, 1024, 32),
    "inception_v3": (2048, 2048, 38),
    "maxvit_t": (512, 512, 32),
    "mnasnet0_5": (1280, 1280, 32),
    "mnasnet0_75": (1280, 1280, 32),
    "mnasnet1_0": (1280, 1280, 32),
    "mnasnet1_3": (1280, 1280, 32),
    "mobilenet_v2": (1280, 1280, 32),
    "mobilenet_v3_large": (1280, 960, 32),
    "mobilenet_v3_small": (1024, 576, 32),
    "regnet_x_16gf": (2048, 2048, 32),
    "regnet_x_1_6gf": (912, 912, 32),
    "regnet_x_32gf": (2520, 2520, 32),
    "regnet_x_3_2gf": (1008, 1008, 32),
    "regnet_x_400mf": (400, 400, 32),
    "regnet_x_800mf": (672, 672, 32),
    "regnet_x_8gf": (1920, 1920, 32),
    "regnet_y_128gf": (7392, 7392, 32),
    "regnet_y_16gf": (3024, 3024, 32),
    "regnet_y_1_6gf": (888, 888, 32),
    "regnet_y_32gf": (3712, 3712, 32),
    "regnet_y_3_2gf": (1512, 1512, 32),
    "regnet_y_400mf": (440, 440, 32),
    "regnet_y_800mf": (784, 784, 32),
    "regnet_y_8gf": (2016, 2016, 32),
    "resnet101": (2048, 2048, 32),
    "resnet152": (2048, 2048, 32),
    "resnet18": (512, 512, 32),
    "resnet34": (512, 512, 32),
    "resnet50": (2048, 2048, 32),
    "resnext101_32x8d": (2048, 2048, 32),
    "resnext101_64x4d": (2048, 2048, 32),
    "resnext50_32x4d": (2048, 2048, 32),
    "shufflenet_v2_x0_5": (1024, 1024, 32),
    "shufflenet_v2_x1_0": (1024, 1024, 32),
    "shufflenet_v2_x1_5": (1024, 1024, 32),
    "shufflenet_v2_x2_0": (2048, 2048, 32),
    "small_cnn": (256, 256, 16),
    "squeezenet1_0": (512, 512, 18),
    "squeezenet1_1": (512, 512, 18),
    "swin_b": (1024, 1024, 32),
    "swin_s": (768, 768, 32),
    "swin_t": (768, 768, 32),
    "swin_v2_b": (1024, 1024, 32),
    "swin_v2_s": (768, 768, 32),
    "swin_v2_t": (768, 768, 32),
    "vgg11": (4096, 512, 32),
    "vgg11_bn": (4096, 512, 32),
    "vgg13": (4096, 512, 32),
    "vgg13_bn": (4096, 512, 32),
    "vgg16": (4096, 512, 32),
    "vgg16_bn": (4096, 512, 32),
    "vgg19": (4096, 512, 32),
    "vgg19_bn": (4096, 512, 32),
    "vit_b_16": (768, 768, 16),
    "vit_b_32": (768, 768, 32),
    "vit_h_14": (1280, 1280, 14),
    "vit_l_16": (1024, 1024, 16),
    "vit_l_32": (1024, 1024, 32),
    "wide_resnet101_2": (2048, 2048, 32),
    "wide_resnet50_2": (2048, 2048, 32),
}
"""Network -> numbers of its pooled feature, channels of its last map, pixels a side that become one place."""

PROCESS_BYTES = 1_500_000_000
"""What a worker holds beside the features: libraries, a network, a batch."""


def numbers_per_image(network: str, size: int, *, is_spatial: bool) -> int:
    """Numbers of the features of an image of `size` pixels a side; of a map rounded up to whole places."""
    pooled, channels, stride = NETWORKS[network]
    return ceil(size / stride) ** 2 * channels if is_spatial else pooled


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
