"""A small network trained from scratch on the seen classes: the backbone where no pretrained weights are given.

It sees whole images and random crops in equal parts, since its features serve for patches of any scale too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from models.base import IntArray, OnProgress, Progress, ignore_progress
from models.errors import InvalidInput, ShapeMismatch, TooFewSamples
from models.params import ScratchParams

FEATURE_DIM = 256
MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)

ImageSource = Callable[[IntArray], Tensor]
"""Row numbers (B,) -> uint8 images (B, 3, h, w), for training sets that should not lie in memory at once."""


class _Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut; halves the side when `stride` is 2."""

    def __init__(self, in_dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, out_dim, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_dim)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_dim)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_dim != out_dim:
            self.shortcut = nn.Sequential(nn.Conv2d(in_dim, out_dim, 1, stride, bias=False), nn.BatchNorm2d(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SmallCNN(nn.Module):
    """0.35 M weights, 29 M multiplications for 96 px. Input: (B, 3, h, w), normalised by `MEAN` and `STD`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 5, 2, 2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.stages = nn.Sequential(_Residual(32, 32, 1), _Residual(32, 64, 2), _Residual(64, 128, 2))
        self.project = nn.Sequential(nn.Conv2d(128, FEATURE_DIM, 1, bias=False), nn.BatchNorm2d(FEATURE_DIM), nn.ReLU())

    def spatial(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, 256, ceil(h / 16), ceil(w / 16))."""
        features: Tensor = self.project(self.stages(self.stem(x)))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, 256): the mean of `spatial` over its places."""
        return self.spatial(x).mean(dim=(2, 3))


def train_small_cnn(
    images: Tensor | NDArray[np.uint8] | ImageSource,
    labels: IntArray,
    params: ScratchParams | None = None,
    *,
    seed: int = 0,
    device: str = "cpu",
    on_progress: OnProgress = ignore_progress,
) -> SmallCNN:
    """A SmallCNN trained to tell the classes of `labels` apart, in evaluation mode; its classifier is thrown away.

    images: uint8 (N, 3, h, w), or a function from row numbers to them. labels: (N,) class indices from 0.
    Same inputs, seed and number of threads: the same weights, bit for bit on the CPU.
    Raises ShapeMismatch, TooFewSamples, InvalidInput; `Cancelled` from `on_progress` passes.
    """
    params = params or ScratchParams()
    targets = torch.as_tensor(np.asarray(labels, dtype=np.int64))
    source = _as_source(images, len(targets))
    n_classes = _check_labels(targets)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallCNN()
        head = nn.Linear(FEATURE_DIM, n_classes)
    network = nn.Sequential(model, head).to(device).to(memory_format=torch.channels_last).train()
    batch_size = min(params.batch_size, len(targets))
    n_batches = len(targets) // batch_size  # the rest of each shuffle waits for another epoch: no batch of one image
    optimizer = torch.optim.AdamW(network.parameters(), lr=params.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _one_cycle(params.epochs * n_batches))
    for epoch in range(params.epochs):
        order = torch.randperm(len(targets), generator=generator)
        total_loss, n_right = 0.0, 0
        for step in range(n_batches):
            rows = order[step * batch_size : (step + 1) * batch_size]
            x = augment(source(rows.numpy()).to(device), generator)
            y = targets[rows].to(device)
            logits = network(x)
            loss = F.cross_entropy(logits, y, label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
            optimizer.step()
            schedule.step()
            total_loss += loss.item()
            n_right += int((logits.argmax(1) == y).sum())
            metrics = {"loss": total_loss / (step + 1), "accuracy": n_right / (batch_size * (step + 1))}
            on_progress(Progress("backbone", epoch * n_batches + step + 1, params.epochs * n_batches, metrics))
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise InvalidInput("Training the small network diverged. Lower the learning rate.", field="params/scratch")
    return model.eval()


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, 3, h, w) -> float32, channels last, as the network expects it."""
    x = images.to(dtype=torch.float32, memory_format=torch.channels_last)
    mean = torch.tensor(MEAN, device=x.device).view(1, 3, 1, 1)
    std = torch.tensor(STD, device=x.device).view(1, 3, 1, 1)
    return x.div_(255).sub_(mean).div_(std)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 (B, 3, h, w) -> normalised float32 of the same size, flipped, cropped and mildly recoloured at random.

    Every second image is kept nearly whole, the others become crops of 6 to 50 % of the area: a watershed patch
    covers 14 to 23 % on average.
    """
    n = len(images)
    x = images.to(dtype=torch.float32, memory_format=torch.channels_last).div_(255)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator).to(x.device)

    is_whole = torch.arange(n, device=x.device) % 2 == 0
    area = torch.where(is_whole, uniform(0.7, 1.0), torch.exp(uniform(math.log(0.06), math.log(0.5))))
    ratio = torch.exp(uniform(-0.3, 0.3))
    width = (area * ratio).sqrt().clamp(max=1.0)  # as a part of the image's side
    height = (area / ratio).sqrt().clamp(max=1.0)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3, device=x.device)
    theta[:, 0, 0] = width * flip
    theta[:, 0, 2] = uniform(-1, 1) * (1 - width)
    theta[:, 1, 1] = height
    theta[:, 1, 2] = uniform(-1, 1) * (1 - height)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    contrast = uniform(0.8, 1.2).view(n, 1, 1, 1)
    brightness = uniform(-0.1, 0.1).view(n, 1, 1, 1)
    x = ((x - 0.5) * contrast + 0.5 + brightness).clamp_(0, 1)
    return normalise(x.mul_(255))


def _one_cycle(n_steps: int) -> Callable[[int], float]:
    """Factor of the peak learning rate: linear warm-up over a fifth of the steps, then a cosine to almost nothing."""
    n_warm = max(1, n_steps // 5)

    def factor(step: int) -> float:
        if step < n_warm:
            return (step + 1) / n_warm
        done = (step - n_warm) / max(1, n_steps - n_warm)
        return max(1e-3, 0.5 * (1 + math.cos(math.pi * done)))

    return factor


def _as_source(images: Tensor | NDArray[np.uint8] | ImageSource, n_labels: int) -> ImageSource:
    if callable(images) and not isinstance(images, Tensor):
        return images
    pixels = torch.as_tensor(images)
    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype != torch.uint8:
        shape = tuple(pixels.shape)
        raise ShapeMismatch(f"Training images must be uint8 of shape (N, 3, h, w), not {pixels.dtype} of {shape}.")
    if len(pixels) != n_labels:
        raise ShapeMismatch(f"There are {len(pixels)} training images but {n_labels} labels.")
    return lambda rows: pixels[torch.as_tensor(rows)]


def _check_labels(targets: Tensor) -> int:
    """The number of classes."""
    if targets.ndim != 1:
        raise ShapeMismatch(f"Labels must have shape (N,), not {tuple(targets.shape)}.")
    if len(targets) < 2:
        raise TooFewSamples(f"Training the small network needs at least 2 images, not {len(targets)}.")
    if int(targets.min()) < 0:
        raise InvalidInput(f"Labels must be class indices from 0, not {int(targets.min())}.")
    return int(targets.max()) + 1
