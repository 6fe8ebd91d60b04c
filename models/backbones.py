"""The networks that turn pixels into features: every torchvision classification network by name, and SmallCNN.

A network is cut before its last classifier layer (`features`), and at its last feature map (`spatial`);
`SpatialBackbone` gives that map where a feature vector is asked for.
Weights come from files; nothing here touches the network.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models

from models import small_cnn
from models.errors import InvalidInput, ShapeMismatch, UnknownName
from models.small_cnn import SmallCNN
from models.weights import load_state, read_state_dict

Precision = Literal["fp32", "bf16"]
SMALL_CNN = "small_cnn"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CPU_MAX_BATCH = 8
"""Images a forward pass on the CPU: their activations stay in the caches and below malloc's mmap threshold."""
GPU_MAX_BATCH = 256

ToMap = Callable[[Tensor], Tensor]
"""The raw output of the spatial layer -> a map (B, C, h, w)."""


@dataclass(frozen=True)
class WeightsFile:
    """Pretrained weights as torchvision publishes them; `sha256_prefix` is what the file's SHA-256 begins with."""

    url: str
    sha256_prefix: str
    file_name: str


@dataclass(eq=False)
class Backbone:
    """A network in evaluation mode with the preparation its weights expect.

    module: normalised float images (B, 3, h, w) -> (B, feature_dim); trainable by whoever fine-tunes it.
    input_size: the side in pixels it was trained on; other sizes work unless `fixed_size`.
    digest: SHA-256 over name, weights and precision: equal digests give equal features.
    """

    name: str
    module: nn.Module
    spatial_layer: nn.Module
    input_size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    precision: Precision = "fp32"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    fixed_size: bool = False
    max_batch: int = CPU_MAX_BATCH
    to_map: ToMap = field(default=lambda output: output, repr=False)
    feature_dim: int = field(init=False)
    spatial_dim: int = field(init=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        self.module.to(self.device).to(memory_format=torch.channels_last).eval()
        probe = torch.zeros((1, 3, self.input_size, self.input_size), dtype=torch.uint8)
        with self._captured_map() as captured:
            self.feature_dim = self.features(probe).shape[1]
        self.spatial_dim = self.to_map(captured[0]).shape[1]
        self.digest = weights_digest(self.name, self.module, self.precision)

    def features(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, h, w) on any device -> float32 (B, feature_dim) on the backbone's device."""
        self.check(images)
        parts = [self._forward(part) for part in _batches(images, self.max_batch)]
        return torch.cat(parts) if parts else torch.empty((0, self.feature_dim), device=self.device)

    def spatial(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, h, w) -> float32 (B, spatial_dim, h', w'): the last feature map (for vit: its token grid)."""
        self.check(images)
        maps: list[Tensor] = []
        with self._captured_map() as captured:
            for part in _batches(images, self.max_batch):
                self._forward(part)
                maps.append(self.to_map(captured.pop()).float())
        return torch.cat(maps) if maps else torch.empty((0, self.spatial_dim, 0, 0), device=self.device)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, h, w) -> float32 on the device, channels last, as `module` expects it."""
        x = images.to(self.device).to(dtype=torch.float32, memory_format=torch.channels_last)
        mean = torch.tensor(self.mean, device=self.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=self.device).view(1, 3, 1, 1)
        return x.sub_(mean * 255).div_(std * 255)

    def _forward(self, images: Tensor) -> Tensor:
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            output: Tensor = self.module(self.normalise(images))
            return output.float()

    def check(self, images: Tensor) -> None:
        """ShapeMismatch where these are no images that the network takes."""
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise ShapeMismatch(
                f"A backbone takes uint8 images of shape (B, 3, h, w), not {images.dtype} of {tuple(images.shape)}."
            )
        side = self.input_size
        if self.fixed_size and images.shape[2:] != (side, side):
            raise ShapeMismatch(
                f"{self.name} takes images of {side}x{side} pixels only, not {tuple(images.shape[2:])}. "
                f"Set the patch size to {side}.",
                field="params/patches/size",
            )

    @contextmanager
    def _captured_map(self) -> Iterator[list[Tensor]]:
        captured: list[Tensor] = []
        caller = threading.get_ident()

        def capture(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            if threading.get_ident() == caller:  # another thread may be in the same network
                captured.append(output)

        handle = self.spatial_layer.register_forward_hook(capture)
        try:
            yield captured
        finally:
            handle.remove()


class BackboneView:
    """Another way to use a backbone, where that runs and in batches of its size."""

    backbone: Backbone

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self.backbone.device

    @property
    def max_batch(self) -> int:
        """Images a forward pass at most."""
        return self.backbone.max_batch


@dataclass(frozen=True)
class SpatialBackbone(BackboneView):
    """A backbone whose feature of an image is its last map: the `channels` of the first place, of the next, and so on.

    The places, row by row from the top left, form a square. Views of one network at one `size` are equal, so that
    whoever gathers images into batches may mix theirs.
    size: side in pixels of the images; it decides how many places there are, and so `feature_dim`.
    """

    backbone: Backbone
    size: int
    feature_dim: int = field(init=False, compare=False)
    digest: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        probe = torch.zeros((1, 3, self.size, self.size), dtype=torch.uint8)
        object.__setattr__(self, "feature_dim", self.features(probe).shape[1])
        digest = hashlib.sha256(f"spatial\n{self.backbone.digest}".encode()).hexdigest()
        object.__setattr__(self, "digest", digest)

    @property
    def channels(self) -> int:
        """Numbers a place."""
        return self.backbone.spatial_dim

    def features(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, size, size) on any device -> float32 (B, places * channels) on the backbone's device."""
        if len(images) == 0:
            return torch.empty((0, self.feature_dim), device=self.device)
        maps = self.backbone.spatial(images)  # (B, channels, h, w)
        return maps.flatten(2).transpose(1, 2).flatten(1)


class FeatureNetwork(Protocol):
    """What turns images into one feature vector each: a backbone, or a view of one."""

    @property
    def feature_dim(self) -> int:
        """Length of the vector."""

    @property
    def digest(self) -> str:
        """Equal digests give equal features."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def max_batch(self) -> int:
        """Images a forward pass at most."""

    def features(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, h, w) on any device -> float32 (B, feature_dim)."""


def list_backbones() -> list[str]:
    """Every name that `create_backbone` knows."""
    return sorted([SMALL_CNN, *list_models(module=torchvision.models)])


def torchvision_weights(name: str) -> WeightsFile:
    """Where torchvision's default weights of a network lie; the caller downloads and checks them."""
    _check_name(name)
    if name == SMALL_CNN:
        raise InvalidInput(
            f"{SMALL_CNN!r} has no pretrained weights. Use weights 'scratch', or another backbone.",
            field="params/backbone/weights",
        )
    url = str(get_model_weights(name).DEFAULT.url)
    file_name = url.rsplit("/", 1)[1]
    match = re.search(r"-([0-9a-f]{8,})\.", file_name)
    return WeightsFile(url, match[1] if match else "", file_name)


def create_backbone(
    name: str,
    *,
    weights: Path | None,
    precision: Precision = "fp32",
    device: str = "cpu",
    seed: int = 0,
) -> Backbone:
    """The network `name` with the weights of a `.pth` or `.safetensors` state dict, or untrained (seeded) without.

    A classifier head in the file is ignored, whatever its number of classes.
    Raises UnknownName, InvalidInput (unreadable file, weights of another network, not finite).
    """
    _check_name(name)
    state = None if weights is None else read_state_dict(weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = SmallCNN() if name == SMALL_CNN else get_model(name, weights=None, **_build_options(name, state))
    head = _cut_head(module)
    if state is not None:
        load_state(module, state, name=name, ignored=(head, "aux1", "aux2", "AuxLogits"))
    else:
        _settle_batch_norm(module, seed)
    if isinstance(module, SmallCNN):
        return small_backbone(module, precision=precision, device=device)
    return _wrap(name, module, precision, torch.device(device))


def small_backbone(module: SmallCNN, *, precision: Precision = "fp32", device: str = "cpu") -> Backbone:
    """A trained SmallCNN as a Backbone."""
    target = torch.device(device)
    return Backbone(
        SMALL_CNN, module, module.project, 96, small_cnn.MEAN, small_cnn.STD, precision, target,
        max_batch=_max_batch(target),
    )  # fmt: skip


def weights_digest(name: str, module: nn.Module, precision: str) -> str:
    """SHA-256 (hexadecimal) over the architecture's name, its weights in the order of their names, and precision."""
    digest = hashlib.sha256(f"{name}\n{precision}\n".encode())
    for key, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{key} {tuple(values.shape)} {values.dtype}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_name(name: str) -> None:
    if name not in (valid := list_backbones()):
        raise UnknownName("backbone", name, valid, field="params/backbone/name")


def _build_options(name: str, state: dict[str, Tensor] | None) -> dict[str, Any]:
    """Arguments of torchvision's builder that the weights decide."""
    if name in ("googlenet", "inception_v3"):
        # Both were converted from networks normalised to [-1, 1]; auxiliary classifiers only serve training.
        return {"aux_logits": False, "init_weights": False, "transform_input": state is not None}
    if name.startswith("vit_") and state is not None:
        positions, kernel = state.get("encoder.pos_embedding"), state.get("conv_proj.weight")
        if positions is not None and kernel is not None and positions.ndim == 3 and kernel.ndim == 4:
            return {"image_size": round((positions.shape[1] - 1) ** 0.5) * kernel.shape[-1]}
    return {}


def _cut_head(module: nn.Module) -> str:
    """Removes the last classifier layer, so that `module` returns the layer's input; the layer's name."""
    if isinstance(module, SmallCNN):
        return ""
    if isinstance(module, torchvision.models.SqueezeNet):  # classifies by a convolution, then pools
        module.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return "classifier"
    head: str = [key for key, layer in module.named_modules() if isinstance(layer, nn.Linear)][-1]
    parent, _, attribute = head.rpartition(".")
    setattr(module.get_submodule(parent), attribute, nn.Identity())
    return head


def _wrap(name: str, module: nn.Module, precision: Precision, device: torch.device) -> Backbone:
    preset = get_model_weights(name).DEFAULT.transforms()
    size = int(getattr(module, "image_size", preset.crop_size[0]))
    to_map: ToMap = _identity
    if isinstance(module, torchvision.models.VisionTransformer):
        layer: nn.Module = module.encoder
        to_map = _token_grid
    else:
        layer = _last_map_layer(module.eval(), size)
        if isinstance(module, torchvision.models.DenseNet):
            to_map = F.relu  # DenseNet applies it as a function, after its last layer
    return Backbone(
        name, module, layer, size, tuple(preset.mean), tuple(preset.std), precision, device,
        fixed_size=isinstance(module, torchvision.models.VisionTransformer | torchvision.models.MaxVit),
        max_batch=_max_batch(device), to_map=to_map,
    )  # fmt: skip


def _last_map_layer(module: nn.Module, size: int) -> nn.Module:
    """The layer whose output is the last feature map (B, C, h, w) with more than one place."""
    last: list[nn.Module] = []

    def remember(layer: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
            last[:] = [layer]

    handles = [layer.register_forward_hook(remember) for layer in module.modules()]
    try:
        with torch.inference_mode():
            module(torch.zeros((1, 3, size, size)))
    finally:
        for handle in handles:
            handle.remove()
    return last[0]


def _settle_batch_norm(module: nn.Module, seed: int) -> None:
    """Measures an untrained network's batch statistics on coloured noise.

    With the initial statistics (mean 0, variance 1) an untrained MobileNet's features are near 1e-9, nothing in fp16.
    On one thread: sums rounded in another order would be other weights, and a network of another digest.
    """
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    if not norms:
        return
    generator = torch.Generator().manual_seed(seed)
    side = 224 if isinstance(module, torchvision.models.MaxVit) else 96  # MaxVit takes one size only
    module.eval()
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.train().momentum = 1.0
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            noise = torch.randn((16, 3, 12, 12), generator=generator)
            module(F.interpolate(noise, size=(side, side), mode="bilinear"))
    finally:
        torch.set_num_threads(n_threads)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.eval().momentum = momentum


def _identity(output: Tensor) -> Tensor:
    return output


def _token_grid(tokens: Tensor) -> Tensor:
    """(B, 1 + side * side, C) with the class token first -> (B, C, side, side)."""
    places = tokens[:, 1:]
    side = round(places.shape[1] ** 0.5)
    return places.transpose(1, 2).reshape(len(tokens), -1, side, side)


def _batches(images: Tensor, size: int) -> list[Tensor]:
    return [images[start : start + size] for start in range(0, len(images), size)]


def _max_batch(device: torch.device) -> int:
    return CPU_MAX_BATCH if device.type == "cpu" else GPU_MAX_BATCH
