"""Scaling of image features, fitted on training rows only and stored with the classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np

from models.base import FloatArray
from models.errors import UnknownName

Scaling = Literal["centered", "zscore", "minmax", "l2", "none"]
_KINDS: tuple[str, ...] = get_args(Scaling)


class FeatureScaling:
    """Scales (n_images, feature_dim) features to float32.

    centered: the training mean taken off, then each row to unit length; networks' features share a large common part
    that says nothing of the class, and a bilinear score without it separates unseen classes far better.
    zscore: each feature to mean 0 and standard deviation 1 over the training rows.
    minmax: each feature to [0, 1] over the training rows; later rows may lie outside (no clipping, as in the papers'
    code). l2: each row to unit length. none: as they are.
    """

    def __init__(self, kind: Scaling) -> None:
        if kind not in _KINDS:
            raise UnknownName("feature scaling", kind, _KINDS, field="params/normalize")
        self.kind = kind
        self._offset = np.zeros(0, np.float32)
        self._range = np.ones(0, np.float32)

    def fit(self, features: FloatArray) -> FeatureScaling:
        """Learn from training rows what the scaling needs."""
        if self.kind in ("centered", "zscore"):
            self._offset = features.mean(axis=0, dtype=np.float64).astype(np.float32)
        if self.kind == "zscore":
            deviation = features.std(axis=0, dtype=np.float64)
            # The mean of equal numbers may be off by rounding, and leave a deviation that is none.
            deviation[deviation <= 1e-6 * np.abs(self._offset)] = 0
            self._range = _divisors(deviation.astype(np.float32))
        if self.kind == "minmax":
            self._offset = features.min(axis=0).astype(np.float32)
            self._range = _divisors(features.max(axis=0).astype(np.float32) - self._offset)
        return self

    def __call__(self, features: FloatArray) -> FloatArray:
        """Scaled float32 copy of `features`."""
        features = np.asarray(features, np.float32)
        if self.kind in ("minmax", "zscore"):
            return (features - self._offset) / self._range
        if self.kind == "centered":
            return unit_rows(features - self._offset)
        if self.kind == "l2":
            return unit_rows(features)
        return features

    def state(self) -> dict[str, FloatArray]:
        """Arrays to store."""
        return {"scaling_offset": self._offset, "scaling_range": self._range}

    @classmethod
    def restore(cls, kind: Scaling, state: Mapping[str, FloatArray]) -> FeatureScaling:
        """The scaling whose `state` was stored."""
        scaling = cls(kind)
        scaling._offset, scaling._range = state["scaling_offset"], state["scaling_range"]
        return scaling


def _divisors(widths: FloatArray) -> FloatArray:
    """A feature that never changes says nothing; dividing by 1 keeps it near 0 instead of blowing it up."""
    return np.where(widths > 0, widths, np.float32(1))


def unit_rows(rows: FloatArray) -> FloatArray:
    """Each row divided by its Euclidean length; a zero row stays zero."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(length > 0, length, 1), rows.dtype)
