"""Where a classifier on feature maps looks: what such a method answers, and what callers ask of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import numpy as np

from models.base import FloatArray, IntArray
from models.errors import ShapeMismatch


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
