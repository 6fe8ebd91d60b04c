"""The networks that `create_backbone` builds, known without torch so that the API can check requests and count memory.

A test compares names and numbers with torchvision's own.
"""

from __future__ import annotations

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

BACKBONE_NAMES: frozenset[str] = frozenset(NETWORKS)

FIXED_SIZE_NAMES: frozenset[str] = frozenset(name for name in BACKBONE_NAMES if name.startswith(("vit_", "maxvit_")))
"""Networks that take images of one size; their last layers cannot be trained apart from the others."""

MAP_SIDES = {name: 6 if name == "alexnet" else 7 for name in NETWORKS if name.startswith(("alexnet", "vgg"))}
"""Networks whose last map has so many places a side, whatever the image's size."""


def network_of(filename: str) -> str | None:
    """The network whose name a weights file begins with: 'resnet50-0676ba61.pth' -> 'resnet50'."""
    fitting = [name for name in BACKBONE_NAMES if filename.lower().startswith(name)]
    return max(fitting, key=len, default=None)
