"""Small networks whose fresh weights come from a given generator alone, so that a seed decides them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear layer whose results are float32 even where its product is computed in bfloat16: losses add them up."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features).float()


def linear(n_in: int, n_out: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer; weights and bias uniform within 1 / sqrt(n_in), torch's own default."""
    # Made without weights: the usual ones would come from torch's own generator, and move it on.
    layer: Linear = Linear(n_in, n_out, device="meta").to_empty(device="cpu")
    bound = n_in**-0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


def perceptron(
    dims: Sequence[int],
    generator: torch.Generator,
    *,
    hidden: Callable[[], nn.Module] = nn.ReLU,
    output: nn.Module | None = None,
) -> nn.Sequential:
    """Linear layers of `dims` with `hidden` between them, and `output` after the last."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(dims):
        layers += [linear(n_in, n_out, generator), hidden()]
    layers.pop()
    if output is not None:
        layers.append(output)
    return nn.Sequential(*layers)
