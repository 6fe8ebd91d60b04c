"""State dicts from files, checked: `.pth` (tensors only, nothing is unpickled) and `.safetensors`."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.errors import InvalidInput

FIELD = "params/backbone/weights"

_OLD_DENSENET_KEY = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)$")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, floats as float32. InvalidInput where it is no such file or holds NaN or infinity.

    A dict under 'state_dict' or 'model' is unwrapped, a 'module.' before every key taken off.
    """
    state = _read(path)
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    if not state or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise InvalidInput(
            f"{path.name} holds no state dict (names with tensors). Save model.state_dict().", field=FIELD
        )
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    state = {_OLD_DENSENET_KEY.sub(r"\1\2", key): _as_float32(value) for key, value in state.items()}
    broken = [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise InvalidInput(f"{path.name} holds NaN or infinite weights in {_names(broken)}.", field=FIELD)
    return state


def load_state(module: nn.Module, state: dict[str, Tensor], *, name: str, ignored: Iterable[str] = ()) -> None:
    """Copies `state` into `module`; every weight must be there and fit. `ignored`: layers that may be left over."""
    prefixes = tuple(f"{layer}." for layer in ignored if layer)
    wanted = {key: value for key, value in state.items() if not key.startswith(prefixes)} if prefixes else state
    try:
        missing, unexpected = module.load_state_dict(wanted, strict=False)
    except RuntimeError as error:  # sizes that differ: torch lists them, one a line, after a headline
        details = " ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise InvalidInput(f"The weights do not fit {name}: {details}", field=FIELD) from error
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]  # a counter that old files lack
    if missing or unexpected:
        problems = [
            f"{what}: {_names(keys)}" for what, keys in (("missing", missing), ("unexpected", unexpected)) if keys
        ]
        raise InvalidInput(
            f"The weights do not belong to {name} ({'; '.join(problems)}). Check the backbone's name.", field=FIELD
        )


def save_state(module: nn.Module, path: Path) -> None:
    """Writes the module's state dict as `.safetensors`."""
    save_file({key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}, path)


def _read(path: Path) -> dict[str, Any]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".safetensors":
            return dict(load_file(path))
        if suffix in (".pth", ".pt"):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            return dict(loaded) if isinstance(loaded, dict) else {}
    except FileNotFoundError as error:
        raise InvalidInput(f"There is no weights file {path.name}.", field=FIELD) from error
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InvalidInput(f"{path.name} cannot be read as weights: {str(error)[:200]}", field=FIELD) from error
    raise InvalidInput(f"{path.name}: weights must be a .pth or .safetensors file.", field=FIELD)


def _as_float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _names(keys: list[str]) -> str:
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return ", ".join(keys[:5]) + more
