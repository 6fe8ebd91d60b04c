"""Mixed precision: which devices multiply fast in bfloat16, and where training does so.

Inside `mixed` the products of layers run in bfloat16; their weights, sums of losses and steps stay in float32. What
would suffer stands in `full_precision`: small differences of large numbers, gradients, steps of the optimizer.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]


def has_fast_bf16(device: str) -> bool:
    """Whether bfloat16 matrix products run on this device's own instructions."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def mixed(precision: Precision, device: str) -> AbstractContextManager[object]:
    """Matrix products in bfloat16 where `precision` asks for it; 'auto': on a GPU with instructions for it, only.

    A CPU computes in float32 unless told otherwise, to the same bits with and without this file.
    """
    wanted = precision == "bf16" or (precision == "auto" and device.startswith("cuda") and has_fast_bf16(device))
    if not wanted:
        return nullcontext()
    # Without torch's cache of converted weights: it lasts as long as the context, and weights change at every step.
    return torch.autocast(torch.device(device).type, torch.bfloat16, cache_enabled=False)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Float32 inside, whatever is around."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
