"""Which backend computes a backbone's features: eager torch, the reference, or one that was measured to be faster.

`auto` measures what is installed on the machine at hand, at the image size asked for, beside torch, and keeps the
answer. A backend is taken where it is clearly faster and its features are those of torch in fp32 but for rounding.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from models.backbones import Backbone, FeatureNetwork
from models.backends.base import Backend, Place
from models.backends.compiled import Compiled
from models.backends.onnx_runtime import ONNXRuntime
from models.backends.openvino_runtime import OpenVINO
from models.errors import InvalidInput

BackendName = Literal["auto", "torch", "openvino", "onnxruntime", "compile"]
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (OpenVINO(), ONNXRuntime(), Compiled())}
RUNS_ON = {"openvino": ("cpu",), "onnxruntime": ("cpu",), "compile": ("cuda", "cpu")}
MEASURED_ON = {"cpu": ("openvino", "onnxruntime"), "cuda": ("compile",)}
"""What `auto` considers; compiling for a CPU takes minutes, and gains less than the others."""
LEAST_COSINE = 1 - 1e-5
"""How alike an image's features must be to those of torch in fp32, so that 99.9 % of photos keep their nearest class.

Features turned at random by so much kept it for all photos that were tried; ten times as much cost up to one in 500.
Backends in fp32 come within 1e-10; bfloat16 turns features by 1e-4 to 4e-2 (bench/backends.py).
"""
LEAST_GAIN = 1.1
PROBE_IMAGES = 32
ROUNDS = 3

Measured = dict[str, dict[str, float]]
"""By backend: `gain`, torch's time over its own, and `cosine`, the least among the probe images' features."""


def fast_network(
    backbone: Backbone, place: Place, *, backend: BackendName = "auto", may_prepare: bool = True
) -> FeatureNetwork:
    """What computes the features of `backbone` soonest at this place.

    may_prepare: whether a network that was not prepared or measured before may be, which takes seconds, and which no
    other thread that uses a network may see on a CPU; if not, it is torch's.
    Raises InvalidInput where a backend is asked for by name and cannot be had; `auto` then takes the next best, with a
    warning if the backend is installed. On a device that a backend is not made for, torch computes.
    """
    if backend == "auto":
        return _fastest(backbone, place, may_prepare=may_prepare)
    if backend == "torch" or backbone.device.type not in RUNS_ON[backend]:
        return backbone
    chosen = BACKENDS[backend]
    try:
        chosen.version()
        return _opened(chosen, backbone, place) if may_prepare or chosen.is_prepared(backbone, place) else backbone
    except Exception as error:  # whatever a converter or another machine's file may raise
        raise InvalidInput(
            f"{backend} cannot run {backbone.name!r}: {error}. Try this: {chosen.needs}; or set UNSEEN_BACKEND to auto."
        ) from error


def awaits_preparation(backbone: Backbone, place: Place, *, backend: BackendName = "auto") -> bool:
    """Whether `fast_network` might give something faster if it may prepare and measure the network first."""
    if backend == "auto":
        machine = _machine(backbone, place)
        if not machine["installed"]:
            return False
        measured = _recalled(backbone, place, machine)
        if measured is None:
            return True
        wanted = _ranked(measured)[:1]
    else:
        wanted = [] if backend == "torch" or backbone.device.type not in RUNS_ON[backend] else [backend]
    return any(not BACKENDS[name].is_prepared(backbone, place) for name in wanted)


def _fastest(backbone: Backbone, place: Place, *, may_prepare: bool) -> FeatureNetwork:
    machine = _machine(backbone, place)
    if not machine["installed"]:
        return backbone
    networks: dict[str, FeatureNetwork] = {}
    measured = _recalled(backbone, place, machine)
    if measured is None:
        if not may_prepare:
            return backbone
        networks = {
            name: network
            for name in machine["installed"]
            if (network := _opened_or_none(BACKENDS[name], backbone, place)) is not None
        }
        measured = _measure(backbone, networks, place)
        if measured:
            _keep(measured, backbone, place, machine)
    for name in _ranked(measured):
        chosen = BACKENDS[name]
        if not may_prepare and not chosen.is_prepared(backbone, place):
            return backbone
        network = networks.get(name) or _opened_or_none(chosen, backbone, place)
        if network is not None:
            return network
    return backbone


def _ranked(measured: Measured) -> list[str]:
    """Those that are clearly faster than torch and near enough to it, the fastest first."""
    good = [name for name, found in measured.items() if found["gain"] >= LEAST_GAIN and found["cosine"] >= LEAST_COSINE]
    return sorted(good, key=lambda name: measured[name]["gain"], reverse=True)


def _opened(chosen: Backend, backbone: Backbone, place: Place) -> FeatureNetwork:
    if not chosen.is_prepared(backbone, place):
        chosen.prepare(backbone, place)
    return chosen.open(backbone, place)


def _opened_or_none(chosen: Backend, backbone: Backbone, place: Place) -> FeatureNetwork | None:
    try:
        return _opened(chosen, backbone, place)
    except Exception as error:  # whatever a converter or another machine's file may raise
        warnings.warn(f"{chosen.name} cannot run {backbone.name!r}: {error}", stacklevel=2)
        return None


def _measure(backbone: Backbone, networks: dict[str, FeatureNetwork], place: Place) -> Measured:
    """All on the same images, in turns; the fastest of each counts, since others may need the machine meanwhile."""
    generator = torch.Generator().manual_seed(0)
    n = min(PROBE_IMAGES, backbone.max_batch)
    images = torch.randint(0, 256, (n, 3, place.size, place.size), dtype=torch.uint8, generator=generator)
    with torch.inference_mode():
        exact = backbone.module(backbone.normalise(images)).double()
    cosines = {
        name: functional.cosine_similarity(network.features(images).double(), exact, dim=1).min().item()
        for name, network in networks.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("torch", *networks)}
    backbone.features(images)
    before = torch.get_num_threads()
    torch.set_num_threads(place.threads_a_batch)
    try:
        for _ in range(ROUNDS):
            for name, network in {"torch": backbone, **networks}.items():
                seconds[name].append(_seconds(network.features, images))
    finally:
        torch.set_num_threads(before)
    slow = min(seconds["torch"])
    return {name: {"gain": slow / min(seconds[name]), "cosine": cosines[name]} for name in networks}


def _seconds(features: Callable[[Tensor], Tensor], images: Tensor) -> float:
    started = time.perf_counter()
    features(images).cpu()  # a GPU's answer is there only when it has arrived
    return time.perf_counter() - started


def _machine(backbone: Backbone, place: Place) -> dict[str, Any]:
    """All that a measurement depends on beside the network and its size."""
    device = backbone.device
    installed = {}
    for name in MEASURED_ON.get(device.type, ()):
        try:
            installed[name] = BACKENDS[name].version()
        except ImportError:
            continue
    return {
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "threads": place.threads,
        "streams": place.streams,
        "torch": torch.__version__,
        "installed": installed,
    }


def _kept(backbone: Backbone, place: Place, machine: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()
    return place.folder(backbone) / f"measured-{digest[:12]}.json"


def _keep(measured: Measured, backbone: Backbone, place: Place, machine: dict[str, Any]) -> None:
    path = _kept(backbone, place, machine)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    aside.write_text(json.dumps({"machine": machine, "measured": measured}), "utf-8")
    aside.replace(path)


def _recalled(backbone: Backbone, place: Place, machine: dict[str, Any]) -> Measured | None:
    """What was measured on such a machine before."""
    try:
        found: Measured = json.loads(_kept(backbone, place, machine).read_text("utf-8"))["measured"]
        return {name: {key: float(each[key]) for key in ("gain", "cosine")} for name, each in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _cpu() -> str:
    """What the machine calls its processor."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
