"""Pixels of patches for end-to-end training of the backbone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from models.data.images import ImageLimits, decode_image
from models.embedding.cutting import decoded_side
from models.embedding.finetune import TrainableBackbone
from models.embedding.patches import cut_patches
from models.params import PatchParams
from service.core.artifacts import image_key
from workers.features import FeatureTable
from workers.runner import TaskContext

if TYPE_CHECKING:
    from torch import Tensor

    from models.backbones import Backbone

CACHED_BYTES = 2 * 2**30  # of cut patches that a reader keeps between epochs


def trainable_backbone(
    context: TaskContext,
    backbone: Backbone,
    sha256s: Sequence[str],
    patches: tuple[FeatureTable, PatchParams],
    images: tuple[FeatureTable, PatchParams],
) -> TrainableBackbone:
    """The backbone with a source of its training pixels: cut again from the stored images at the recorded boxes."""
    readers = [PatchReader(context, sha256s, table, params) for table, params in (patches, images)]
    return TrainableBackbone(backbone.module, readers[0].read, readers[1].read, backbone.normalise)


class PatchReader:
    """Rows of a feature table -> uint8 pixels (B, 3, size, size); images decoded lately stay cut."""

    def __init__(self, context: TaskContext, sha256s: Sequence[str], table: FeatureTable, params: PatchParams) -> None:
        self._context = context
        self._sha256s = sha256s
        self._table = table
        self._params = params
        self._first = np.searchsorted(table.image_index, np.arange(len(sha256s) + 1))
        self._cut: OrderedDict[int, Tensor] = OrderedDict()
        settings = context.settings
        self._limits = ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels)

    def read(self, rows: np.ndarray[Any, Any]) -> Tensor:
        """Pixels of the rows, in their order."""
        import torch

        images = self._table.image_index[rows]
        return torch.stack(
            [self._patches(int(i))[int(r) - int(self._first[i])] for r, i in zip(rows, images, strict=True)]
        )

    def _patches(self, image: int) -> Tensor:
        if image in self._cut:
            self._cut.move_to_end(image)
            return self._cut[image]
        data = self._context.store.read_bytes(image_key(self._sha256s[image]))
        # The same reduction as in extraction: the recorded boxes are in that picture's pixels.
        pixels = decode_image(data, self._limits, target_side=decoded_side(self._params))
        boxes = self._table.boxes[self._first[image] : self._first[image + 1]]
        patches = cut_patches(pixels, boxes, self._params.size)
        self._cut[image] = patches
        while len(self._cut) * patches.numel() > CACHED_BYTES:
            self._cut.popitem(last=False)
        return patches
