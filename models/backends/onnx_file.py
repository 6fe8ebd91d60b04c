"""A network as an ONNX file, exported once: OpenVINO and ONNX Runtime read the same file and the same weights."""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from importlib import metadata
from pathlib import Path

import torch

from models.backbones import Backbone, Precision
from models.backends.base import Place, PreparedNetwork, Run, Whole
from models.backends.spread import Spread

WEIGHTS = ".data"
"""What the name of the file with the weights has more."""


class FromONNX(ABC):
    """The part that backends which read the file share. `name` is also that of their package.

    can_spread: whether batches may be shared out among threads that end with the network.
    """

    name: str
    can_spread: bool

    @abstractmethod
    def load(self, file: Path, precision: Precision, threads: int, streams: int) -> Run:
        """Loads the network, in a fraction of a second; `streams` batches at a time share the threads."""

    def version(self) -> str:
        """Of the library; ImportError where it is not installed."""
        return metadata.version(self.name)

    def is_prepared(self, backbone: Backbone, place: Place) -> bool:
        """Whether the file is there."""
        return onnx_file(backbone, place).is_file()

    def prepare(self, backbone: Backbone, place: Place) -> None:
        """Writes the file. Tracing the network catches what other threads compute with it meanwhile."""
        export(backbone, place.size, onnx_file(backbone, place).parent)

    def open(self, backbone: Backbone, place: Place) -> PreparedNetwork:
        """Loads the network. Where one batch has several threads, twice: to share layers, and to share out images."""
        file, threads = onnx_file(backbone, place), place.threads
        run = self.load(file, backbone.precision, threads, place.streams)
        is_spread = self.can_spread and place.streams == 1 < threads
        if is_spread:
            run = Spread(run, self.load(file, backbone.precision, threads, streams=threads), threads)
        n_bytes = (1 + is_spread) * weights_bytes(file)
        return PreparedNetwork(self.name, backbone, place.size, run, n_bytes, queues=is_spread)


def onnx_file(backbone: Backbone, place: Place) -> Path:
    """Where the network lies, or would."""
    return place.folder(backbone) / "onnx" / "model.onnx"


def weights_bytes(file: Path) -> int:
    """Size of the weights beside an ONNX file."""
    return file.with_name(file.name + WEIGHTS).stat().st_size


def export(backbone: Backbone, size: int, target: Path) -> None:
    """Writes model.onnx and its weights to the folder `target`, as a whole or not at all. ImportError without onnx."""
    import onnxscript  # noqa: F401 - torch would only notice its absence after the longest step

    example = torch.zeros((2, 3, size, size), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=4096)
    with torch.no_grad():
        traced = torch.export.export(Whole(backbone).eval(), (example,), dynamic_shapes=({0: batch},))
        program = torch.onnx.export(traced, (), verbose=False)
    assert program is not None
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=".part-"))
    try:
        program.save(aside / "model.onnx", external_data=True)
        aside.rename(target)
    except OSError:
        if not (target / "model.onnx").is_file():  # else another process was faster
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
