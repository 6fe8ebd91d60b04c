"""Device, seeds, threads and memory of a worker's process. torch is imported only inside the functions: the parent
of an RQ worker imports this file, and a fork after torch has run anything hangs the child.
"""

from __future__ import annotations

import random
import re

from models.errors import InvalidInput


def choose_device(setting: str) -> str:
    """'cpu', 'cuda' or 'cuda:N' for a setting of 'auto', 'cpu', 'cuda' or 'cuda:N'; auto: a GPU where there is one.

    Raises InvalidInput for another word and for a GPU that is not there.
    """
    if setting == "cpu":
        return "cpu"
    if setting != "auto" and not re.fullmatch(r"cuda(:\d+)?", setting):
        raise InvalidInput(f"Unknown device {setting!r}. Use 'auto', 'cpu', 'cuda' or 'cuda:N'.", field="device")
    import torch

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting == "auto":
        return "cuda" if n_gpus else "cpu"
    if int(setting.partition(":")[2] or 0) >= n_gpus:
        raise InvalidInput(
            f"Device {setting!r} is not there: torch sees {n_gpus} GPUs. Use 'auto' or 'cpu'.", field="device"
        )
    return setting


def seed_everything(seed: int) -> None:
    """Seeds Python's, numpy's and torch's global generators: a net below code that takes its seed as an argument."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
