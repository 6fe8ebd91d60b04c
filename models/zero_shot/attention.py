"""What classifiers on feature maps share: what they take, and where they look."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import numpy as np

from models.base import FloatArray, IntArray, LabelledFeatures
from models.errors import InvalidInput, ShapeMismatch


@dataclass(frozen=True)
class AttentionMaps:
    """Where the network looks, for B images on a grid of side x side places; each map sums to 1.

    dimensions, strengths: (B, K) those of the class embedding that speak loudest for it, and how much each adds to the
    class's score. local: (B, K, side, side) their attention. whole: (B, side, side) the mean over all dimensions.
    """

    dimensions: IntArray
    strengths: FloatArray
    local: FloatArray
    whole: FloatArray

    @classmethod
    def loudest(cls, attention: FloatArray, strengths: FloatArray, top: int) -> Self:
        """The `top` dimensions of each image: attention (B, A, R) of all over R places, strengths (B, A)."""
        side = math.isqrt(attention.shape[2])
        if side * side != attention.shape[2]:
            raise ShapeMismatch(f"{attention.shape[2]} places are no square; maps need one.")
        maps = attention.reshape(*attention.shape[:2], side, side)
        dimensions = np.argsort(-strengths, axis=1, kind="stable")[:, :top]
        rows = np.arange(len(maps))[:, None]
        return cls(dimensions, strengths[rows, dimensions], maps[rows, dimensions], maps.mean(axis=1))


@runtime_checkable
class Attentive(Protocol):
    """A fitted classifier that can say where it looks."""

    def attention(self, features: FloatArray, embeddings: FloatArray, *, top: int = 8) -> AttentionMaps:
        """Maps of raw features (B, feature_dim), each image for one class: row of `embeddings` (B, embedding_dim)."""
        ...


def map_channels(features: LabelledFeatures, name: str, instead: str) -> int:
    """Numbers of one place of the maps that the method called `name` needs; `instead`: what takes pooled features.

    InvalidInput where they are pooled, ShapeMismatch where they are no maps.
    """
    channels, shape = features.channels, np.shape(features.features)
    if channels is None:
        raise InvalidInput(
            f"{name} needs a feature map of each image, places times channels, and these features are pooled. "
            f"Set `channels` to the numbers of one place, or use {instead}."
        )
    if channels < 1 or shape[1] % channels:
        raise ShapeMismatch(f"features {shape} are no maps: {shape[1]} is no multiple of {channels} channels.")
    return channels


def check_pairs(features: FloatArray, embeddings: FloatArray, dims: tuple[int, int]) -> None:
    """ShapeMismatch, unless each image has one class's embedding and both have the widths `dims` of training."""
    if features.ndim != 2 or features.shape[1] != dims[0] or embeddings.shape != (len(features), dims[1]):
        raise ShapeMismatch(
            f"features {features.shape} and embeddings {embeddings.shape} must be (n_images, {dims[0]}) and "
            f"(n_images, {dims[1]}), as in training."
        )
