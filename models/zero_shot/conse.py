"""CONSE: an image's embedding is the convex combination of its likeliest seen classes'.

Norouzi et al., "Zero-Shot Learning by Convex Combination of Semantic Embeddings" (ICLR 2014,
https://arxiv.org/abs/1312.5650), Eq. 2-4:
    f(x) = 1/Z sum_{t=1..T} p(c_t | x) phi(c_t),   Z = sum_{t=1..T} p(c_t | x),   score(x, y) = cos(f(x), phi(y))
with c_1, c_2, ... the seen classes from the likeliest down, and p a softmax classifier of seen classes: here
multinomial logistic regression on the features, with a ridge.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from scipy.special import softmax

from models.base import FloatArray, OnProgress, Progress
from models.classic_params import ConSEParams
from models.evaluation import zsl_report
from models.params import Params
from models.zero_shot.base import History, Setting
from models.zero_shot.folds import Rows
from models.zero_shot.grid import pick_on_grid
from models.zero_shot.linear import Heads, RidgeModel, RidgePath, softmax_loss
from models.zero_shot.scaling import unit_rows

_TOPS = (1, 2, 3, 5, 10, 20, 50)
_DEFAULT_TOP = 10  # the paper's


class ConSE(RidgeModel):
    """T and the classifier's ridge given, or chosen on validation classes."""

    method: ClassVar[str] = "conse"
    params_class: ClassVar[type[Params]] = ConSEParams
    params: ConSEParams
    DEFAULT_RIDGE: ClassVar[float] = 1e-4

    def _new_path(self, train: Rows) -> RidgePath:
        return RidgePath(train.features, softmax_loss(train.labels), len(train.embeddings))

    def _learn(self, train: Rows, setting: Setting | None, on_progress: OnProgress) -> tuple[Setting, History]:
        setting = setting or {"relative_ridge": self.DEFAULT_RIDGE, "top": float(self.params.top or _DEFAULT_TOP)}
        path = self._path_of(train)
        self._classifier, ridge = self._heads(path, setting["relative_ridge"])
        self._solved = None
        self._seen = train.embeddings
        self._top = int(setting["top"])
        used = {**setting, "relative_ridge": ridge / path.scale, "lamda": ridge}
        on_progress(Progress("training", 1, 1))
        return used, [used]

    def _try_settings(self, train: Rows, validation: Rows, on_progress: OnProgress) -> History:
        if self.params.lamda is not None and self.params.top is not None:
            return []
        path, ridges = self._path_of(train), self._ridges()
        names = [str(i) for i in range(len(validation.embeddings))]
        history: History = []
        for i, relative in enumerate(ridges):
            probabilities = softmax(self._heads(path, relative)[0](validation.features), axis=1)
            for top in _TOPS if self.params.top is None else (self.params.top,):
                scores = combine(probabilities, train.embeddings, top) @ validation.embeddings.T
                t1 = zsl_report(scores, validation.labels, names).t1
                history.append({"relative_ridge": relative, "top": float(top), "validation_t1": t1})
            best = max(entry["validation_t1"] for entry in history)
            on_progress(Progress("choosing", i + 1, len(ridges), {"validation_t1": best}))
        return history

    def _pick(self, tried: list[History]) -> Setting:
        return pick_on_grid(tried, ["relative_ridge", "top"])

    def _compatibility(self, features: FloatArray, embeddings: FloatArray) -> FloatArray:
        probabilities = softmax(self._classifier(features), axis=1)
        return np.asarray(combine(probabilities, self._seen, self._top) @ embeddings.T, np.float32)

    def _state(self) -> dict[str, FloatArray]:
        return {
            "weight": self._classifier.weight,
            "bias": self._classifier.bias,
            "seen": self._seen,
            "top": np.array([self._top], np.float32),
        }

    def _restore(self, state: Mapping[str, FloatArray]) -> None:
        self._classifier = Heads(state["weight"], state["bias"])
        self._seen = state["seen"]
        self._top = int(state["top"][0])


def combine(probabilities: FloatArray, seen: FloatArray, top: int) -> FloatArray:
    """f(x) scaled to unit length, (n_images, embedding_dim): the `top` likeliest rows of `seen`, by `probabilities`.

    Scaling makes the dot product with a unit embedding their cosine; it also makes 1/Z superfluous.
    """
    likeliest = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    weights = np.zeros_like(probabilities)
    np.put_along_axis(weights, likeliest, np.take_along_axis(probabilities, likeliest, axis=1), axis=1)
    return unit_rows(weights @ seen)
