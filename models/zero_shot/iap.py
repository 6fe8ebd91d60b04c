"""IAP: indirect attribute prediction, by way of the seen classes.

Lampert, Nickisch and Harmeling, "Attribute-Based Classification for Zero-Shot Visual Object Categorization" (TPAMI
2014, https://doi.org/10.1109/TPAMI.2013.140; CVPR 2009), Eq. 3-4:
    p(a_m = 1 | x) = sum_k a_m^k p(k | x)   over the seen classes k,
    p(y | x) ~ prod_m p(a_m = a_m^y | x) / p(a_m = a_m^y)
with p(k | x) multinomial logistic regression with a ridge; the prior p(a_m = 1) is the share of seen classes that have
the attribute. Scores are the logarithm. Embeddings become attributes by a threshold: see `Attributes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from scipy.special import softmax

from models.base import FloatArray, OnProgress, Progress
from models.classic_params import IAPParams
from models.evaluation import zsl_report
from models.params import Params
from models.zero_shot.attributes import Attributes, log_posterior_ratio
from models.zero_shot.base import History, Setting
from models.zero_shot.folds import Rows
from models.zero_shot.grid import pick_on_grid
from models.zero_shot.linear import Heads, RidgeModel, RidgePath, softmax_loss

_LEAST = 1e-12
"""Lowest probability of an attribute: one class that is certain of rounding to 0 may not rule all others out."""


class IAP(RidgeModel):
    """The ridge of the classifier of seen classes given, or chosen on validation classes."""

    method: ClassVar[str] = "iap"
    params_class: ClassVar[type[Params]] = IAPParams
    params: IAPParams
    DEFAULT_RIDGE: ClassVar[float] = 1e-4

    def _new_path(self, train: Rows) -> RidgePath:
        return RidgePath(train.features, softmax_loss(train.labels), len(train.embeddings))

    def _learn(self, train: Rows, setting: Setting | None, on_progress: OnProgress) -> tuple[Setting, History]:
        setting = setting or {"relative_ridge": self.DEFAULT_RIDGE}
        path = self._path_of(train)
        self._attributes = Attributes.of(train.embeddings)
        self._seen_has = self._attributes(train.embeddings)
        self._classifier, ridge = self._heads(path, setting["relative_ridge"])
        self._solved = None
        used = {"relative_ridge": ridge / path.scale, "lamda": ridge, **self._attributes.report()}
        on_progress(Progress("training", 1, 1))
        return used, [used]

    def _try_settings(self, train: Rows, validation: Rows, on_progress: OnProgress) -> History:
        if self.params.lamda is not None:
            return []
        path, ridges = self._path_of(train), self._ridges()
        attributes = Attributes.of(train.embeddings)
        seen_has = attributes(train.embeddings)
        names = [str(i) for i in range(len(validation.embeddings))]
        history: History = []
        for i, relative in enumerate(ridges):
            logits = self._heads(path, relative)[0](validation.features)
            scores = score(logits, seen_has, attributes, validation.embeddings)
            t1 = zsl_report(scores, validation.labels, names).t1
            history.append({"relative_ridge": relative, "validation_t1": t1})
            on_progress(Progress("choosing", i + 1, len(ridges), {"validation_t1": t1}))
        return history

    def _pick(self, tried: list[History]) -> Setting:
        return pick_on_grid(tried, ["relative_ridge"])

    def _compatibility(self, features: FloatArray, embeddings: FloatArray) -> FloatArray:
        scores = score(self._classifier(features), self._seen_has, self._attributes, embeddings)
        return np.asarray(scores, np.float32)

    def _state(self) -> dict[str, FloatArray]:
        attributes, heads = self._attributes, self._classifier
        return {
            "threshold": attributes.threshold,
            "kept": attributes.kept,
            "prior": attributes.prior,
            "seen_has": self._seen_has,
            "weight": heads.weight,
            "bias": heads.bias,
        }

    def _restore(self, state: Mapping[str, FloatArray]) -> None:
        self._attributes = Attributes(state["threshold"], state["kept"], state["prior"])
        self._seen_has = state["seen_has"]
        self._classifier = Heads(state["weight"], state["bias"])


def score(logits: FloatArray, seen_has: FloatArray, attributes: Attributes, embeddings: FloatArray) -> FloatArray:
    """log p(y | x) up to a term of x alone, (n_images, n_classes).

    logits: (n_images, n_seen) of the seen classes; seen_has: (n_seen, n_kept) of 0 and 1.
    """
    of_class = softmax(logits.astype(np.float64), axis=1)
    log_yes = np.log(np.maximum(of_class @ seen_has, _LEAST))
    log_no = np.log(np.maximum(of_class @ (1 - seen_has), _LEAST))
    return log_posterior_ratio(log_yes, log_no, attributes(embeddings), attributes.prior)
