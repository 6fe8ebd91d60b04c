"""DAP: direct attribute prediction.

Lampert, Nickisch and Harmeling, "Attribute-Based Classification for Zero-Shot Visual Object Categorization" (TPAMI
2014, https://doi.org/10.1109/TPAMI.2013.140; CVPR 2009), Eq. 2:
    p(y | x) ~ prod_m p(a_m = a_m^y | x) / p(a_m = a_m^y)
with a probabilistic classifier for each attribute, here logistic regression with a ridge, learned from all seen images
with their class's attributes as labels; the prior p(a_m = 1) is the share of seen classes that have the attribute.
Scores are the logarithm. Embeddings become attributes by a threshold: see `Attributes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from models.base import FloatArray, OnProgress, Progress
from models.classic_params import DAPParams
from models.evaluation import zsl_report
from models.params import Params
from models.zero_shot.attributes import Attributes, log_posterior_ratio
from models.zero_shot.base import History, Setting
from models.zero_shot.folds import Rows
from models.zero_shot.grid import pick_on_grid
from models.zero_shot.linear import Heads, RidgeModel, RidgePath, logistic_loss


class DAP(RidgeModel):
    """The ridge of the attribute classifiers given, or chosen on validation classes."""

    method: ClassVar[str] = "dap"
    params_class: ClassVar[type[Params]] = DAPParams
    params: DAPParams
    DEFAULT_RIDGE: ClassVar[float] = 1e-3

    def _new_path(self, train: Rows) -> RidgePath:
        has = Attributes.of(train.embeddings)(train.embeddings)
        targets = (2 * has - 1).astype(np.float32)[train.labels]  # (n_images, n_kept)
        return RidgePath(train.features, logistic_loss(targets), targets.shape[1])

    def _learn(self, train: Rows, setting: Setting | None, on_progress: OnProgress) -> tuple[Setting, History]:
        setting = setting or {"relative_ridge": self.DEFAULT_RIDGE}
        path = self._path_of(train)
        self._attributes = Attributes.of(train.embeddings)
        self._classifiers, ridge = self._heads(path, setting["relative_ridge"])
        self._solved = None
        used = {"relative_ridge": ridge / path.scale, "lamda": ridge, **self._attributes.report()}
        on_progress(Progress("training", 1, 1))
        return used, [used]

    def _try_settings(self, train: Rows, validation: Rows, on_progress: OnProgress) -> History:
        if self.params.lamda is not None:
            return []
        path, ridges = self._path_of(train), self._ridges()
        attributes = Attributes.of(train.embeddings)
        names = [str(i) for i in range(len(validation.embeddings))]
        history: History = []
        for i, relative in enumerate(ridges):
            logits = self._heads(path, relative)[0](validation.features)
            t1 = zsl_report(score(logits, attributes, validation.embeddings), validation.labels, names).t1
            history.append({"relative_ridge": relative, "validation_t1": t1})
            on_progress(Progress("choosing", i + 1, len(ridges), {"validation_t1": t1}))
        return history

    def _pick(self, tried: list[History]) -> Setting:
        return pick_on_grid(tried, ["relative_ridge"])

    def _compatibility(self, features: FloatArray, embeddings: FloatArray) -> FloatArray:
        return np.asarray(score(self._classifiers(features), self._attributes, embeddings), np.float32)

    def _state(self) -> dict[str, FloatArray]:
        attributes, heads = self._attributes, self._classifiers
        return {
            "threshold": attributes.threshold,
            "kept": attributes.kept,
            "prior": attributes.prior,
            "weight": heads.weight,
            "bias": heads.bias,
        }

    def _restore(self, state: Mapping[str, FloatArray]) -> None:
        self._attributes = Attributes(state["threshold"], state["kept"], state["prior"])
        self._classifiers = Heads(state["weight"], state["bias"])


def score(logits: FloatArray, attributes: Attributes, embeddings: FloatArray) -> FloatArray:
    """log p(y | x) up to a term of x alone, (n_images, n_classes), from the attributes' logits (n_images, n_kept)."""
    logits = logits.astype(np.float64)
    log_yes, log_no = -np.logaddexp(0, -logits), -np.logaddexp(0, logits)
    return log_posterior_ratio(log_yes, log_no, attributes(embeddings), attributes.prior)
