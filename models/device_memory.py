"""What to do when a device's memory does not hold a step of training: smaller batches, and a word about it.

The training begins anew with them. A device runs out in the first steps, so that little is lost; and what comes out is
what asking for the smaller batches would have given, with one batch size in every fold.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from pydantic import ValidationError

from models.errors import OutOfDeviceMemory
from models.params import Params

P = TypeVar("P", bound=Params)


def with_smaller_batches(params: P, train: Callable[[P], None], tell: Callable[[str], None]) -> str:
    """Run `train` with `params`; as often as the device's memory does not suffice, again with half the `batch_size`.

    Returns what there is to report, empty where all went as asked; `tell` gets it at once, after each halving.
    Raises OutOfDeviceMemory where `params` have no batch size, or their bounds allow no smaller one.
    """
    report, current = "", params
    while True:
        try:
            train(current)
        except torch.OutOfMemoryError as error:
            cause = str(error)
        else:
            return report
        # Not in the handler: there the error's frames would keep the tensors of the step that failed.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        current = _halved(current, cause)
        asked, used = (getattr(chosen, "batch_size", None) for chosen in (params, current))
        report = f"The device's memory does not hold batches of {asked}; batches of {used} are used instead."
        tell(report)


def _halved(params: P, cause: str) -> P:
    size = getattr(params, "batch_size", None)
    if size is None:
        raise OutOfDeviceMemory(f"The device's memory does not suffice, and the method knows no batches: {cause}")
    try:
        return type(params).model_validate({**params.model_dump(), "batch_size": size // 2})
    except ValidationError:
        raise OutOfDeviceMemory(
            f"The device's memory does not even hold batches of {size}. Use a smaller model, fewer images or smaller "
            f"features, or a larger device: {cause}"
        ) from None
