"""Ways to compute a backbone's features: torch, the reference, and OpenVINO, which takes a CPU a fraction of the time.

`auto` measures both on the machine at hand, at the image size asked for, and keeps the answer beside the converted
network. OpenVINO is taken where it is clearly faster and its features are torch's but for rounding.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbones import Backbone, BackboneView, FeatureNetwork
from models.errors import InvalidInput, ShapeMismatch

BackendName = Literal["auto", "torch", "openvino"]
LEAST_COSINE = {"fp32": 1 - 1e-5, "bf16": 0.99}
"""By precision: how alike the features of an image must be. Those of fp32 differ by some 1e-6 of their length."""
LEAST_GAIN = 1.1
PROBE_IMAGES = 8
ROUNDS = 3
_MODEL, _WEIGHTS, _MEASURED = "model.xml", "model.bin", "measured.json"


@dataclass(frozen=True)
class OpenVINOBackbone(BackboneView):
    """A backbone whose features OpenVINO computes, for images of one `size`. Views of one network are equal.

    measured: `gain`, torch's time over OpenVINO's, and `cosine`, the least among the probe images' features.
    n_bytes: of its own copy of the weights.
    """

    backbone: Backbone
    size: int
    measured: dict[str, Any] = field(compare=False)
    n_bytes: int = field(compare=False)
    _compiled: Any = field(compare=False, repr=False)
    _requests: threading.local = field(default_factory=threading.local, compare=False, repr=False)

    @property
    def feature_dim(self) -> int:
        """Length of the vector."""
        return self.backbone.feature_dim

    @property
    def digest(self) -> str:
        """The backbone's own: rounding apart, the features are the same."""
        return self.backbone.digest

    def features(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, size, size) -> float32 (B, feature_dim)."""
        self.backbone.check(images)
        if images.shape[2:] != (self.size, self.size):
            raise ShapeMismatch(
                f"The network was prepared for images of {self.size} pixels, not {tuple(images.shape[2:])}."
            )
        if not hasattr(self._requests, "own"):  # one serves one thread
            self._requests.own = self._compiled.create_infer_request()
        parts = torch.split(images.contiguous(), self.max_batch)
        rows = [torch.from_numpy(self._requests.own.infer([part.numpy()])[0]) for part in parts if len(part)]
        return torch.cat(rows) if rows else torch.empty((0, self.feature_dim))


def fast_network(
    backbone: Backbone,
    size: int,
    *,
    backend: BackendName = "auto",
    directory: Path,
    threads: int = 0,
    streams: int = 1,
    may_convert: bool = True,
) -> FeatureNetwork:
    """What computes the features of `backbone` for images of `size` pixels a side.

    directory: where converted networks are kept. threads: of the CPU; 0: as many as torch uses. streams: batches that
    run at a time, sharing the threads. may_convert: whether a network that was not converted before may be, which takes
    seconds, and which no other thread that uses a network may see; if not, it is torch's.
    Raises InvalidInput where `openvino` is asked for and cannot be had; `auto` then takes torch, with a warning if
    OpenVINO is installed.
    """
    if backend == "torch" or backbone.device.type != "cpu":
        return backbone
    try:
        options = {"INFERENCE_NUM_THREADS": threads or torch.get_num_threads(), "NUM_STREAMS": streams}
        found = _open(backbone, size, directory, options, may_convert=may_convert)
    except Exception as error:  # whatever a converter or another machine's file may raise
        if backend == "openvino":
            raise InvalidInput(
                f"OpenVINO cannot run {backbone.name!r}: {error}. Install it (pip install 'unseen[openvino]'), or set "
                "UNSEEN_BACKEND to torch."
            ) from error
        if not isinstance(error, ImportError):
            warnings.warn(f"OpenVINO cannot run {backbone.name!r}, torch does: {error}", stacklevel=2)
        return backbone
    if found is None:
        return backbone
    measured = found.measured
    is_better = measured["gain"] >= LEAST_GAIN and measured["cosine"] >= LEAST_COSINE[backbone.precision]
    return found if is_better or backend == "openvino" else backbone


def awaits_conversion(backbone: Backbone, size: int, *, backend: BackendName = "auto", directory: Path) -> bool:
    """Whether `fast_network` would have to convert the network first."""
    if backend == "torch" or backbone.device.type != "cpu":
        return False
    try:
        kept = _kept(_import_openvino(), backbone, size, directory)
    except ImportError:
        return False
    return not (kept / _MODEL).is_file()


def _kept(openvino: Any, backbone: Backbone, size: int, directory: Path) -> Path:
    """Where the converted network lies, or would."""
    return directory / f"{backbone.digest[:32]}-{size}-{openvino.__version__.partition('-')[0]}"


def _open(
    backbone: Backbone, size: int, directory: Path, options: dict[str, int], *, may_convert: bool
) -> OpenVINOBackbone | None:
    openvino = _import_openvino()
    kept = _kept(openvino, backbone, size, directory)
    if not (kept / _MODEL).is_file():
        if not may_convert:
            return None
        _convert(openvino, backbone, size, kept)
    precision = {"fp32": "f32", "bf16": "bf16"}[backbone.precision]
    compiled = openvino.Core().compile_model(kept / _MODEL, "CPU", {"INFERENCE_PRECISION_HINT": precision, **options})
    found = OpenVINOBackbone(backbone, size, {}, (kept / _WEIGHTS).stat().st_size, compiled)
    machine = {**options, "cpu": _cpu(), "torch": torch.__version__}
    measured = _recalled(kept / _MEASURED, machine) or _measure(found, kept / _MEASURED, machine)
    return replace(found, measured=measured)


def _import_openvino() -> Any:
    # It reports its use to its makers over the network, from the moment it is imported, unless this is missing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: not to be found
    import openvino

    return openvino


class _Whole(nn.Module):
    """A network with the preparation of its images."""

    offset: Tensor
    scale: Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.module = backbone.module
        self.register_buffer("offset", torch.tensor(backbone.mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("scale", torch.tensor(backbone.std).view(1, 3, 1, 1) * 255)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.module((images.float() - self.offset) / self.scale)
        return features


def _convert(openvino: Any, backbone: Backbone, size: int, target: Path) -> None:
    """Writes the network to `target`, as a whole or not at all."""
    example = torch.zeros((2, 3, size, size), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=4096)
    with torch.no_grad():
        exported = torch.export.export(_Whole(backbone).eval(), (example,), dynamic_shapes=({0: batch},))
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=".part-"))
    try:
        openvino.save_model(openvino.convert_model(exported), aside / _MODEL, compress_to_fp16=False)
        aside.rename(target)
    except OSError:
        if not (target / _MODEL).is_file():  # else another process was faster
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _measure(network: OpenVINOBackbone, kept: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """Both on the same images, in turns; the fastest of each counts, since others may need the machine meanwhile."""
    generator = torch.Generator().manual_seed(0)
    size, own = network.size, network.backbone
    images = torch.randint(0, 256, (PROBE_IMAGES, 3, size, size), dtype=torch.uint8, generator=generator)
    cosine = functional.cosine_similarity(network.features(images), own.features(images), dim=1).min().item()
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, machine["INFERENCE_NUM_THREADS"] // machine["NUM_STREAMS"]))  # what one batch gets
    try:
        times = [
            (_seconds(lambda: own.features(images)), _seconds(lambda: network.features(images))) for _ in range(ROUNDS)
        ]
    finally:
        torch.set_num_threads(before)
    slow, fast = (min(column) for column in zip(*times, strict=True))
    measured = {**machine, "gain": slow / fast, "cosine": cosine}
    aside = kept.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    aside.write_text(json.dumps(measured), "utf-8")
    aside.replace(kept)
    return measured


def _recalled(kept: Path, machine: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured on such a machine before."""
    try:
        measured: dict[str, Any] = json.loads(kept.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return measured if machine.items() <= measured.items() and {"gain", "cosine"} <= measured.keys() else None


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _cpu() -> str:
    """What the machine calls its processor."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
