"""Class embeddings as yes-or-no attributes, for the methods that predict attributes one by one (DAP, IAP)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.base import FloatArray
from models.errors import InvalidInput


@dataclass(frozen=True)
class Attributes:
    """Which classes have which attribute: those whose value lies above the attribute's threshold.

    threshold: (embedding_dim,). kept: (embedding_dim,) of 1 and 0; attributes that all seen classes share, or none has,
    are left out, for nothing can be learned of them. prior: (n_kept,) share of seen classes that have the attribute.
    """

    threshold: FloatArray
    kept: FloatArray
    prior: FloatArray

    @classmethod
    def of(cls, embeddings: FloatArray) -> Attributes:
        """From the unit embeddings (n_classes, embedding_dim) of seen classes.

        Thresholds are the means over seen classes; 0 where the embeddings have two values only (0 and 1, or -1 and 1),
        which scaling to unit length makes 0 and one positive value, or plus and minus one value, in each row.
        InvalidInput where no attribute tells any two seen classes apart.
        """
        mean = embeddings.mean(axis=0, dtype=np.float64).astype(np.float32)
        threshold = np.zeros_like(mean) if is_binary(embeddings) else mean
        has = embeddings > threshold
        kept = has.any(axis=0) & ~has.all(axis=0)
        if not kept.any():
            raise InvalidInput(
                f"None of {len(mean)} attributes differs over {len(embeddings)} seen classes, so none can be learned. "
                "Give other class embeddings or more seen classes.",
                field="class_embeddings",
            )
        prior = has[:, kept].mean(axis=0)
        return cls(threshold, kept.astype(np.float32), prior.astype(np.float32))

    def __call__(self, embeddings: FloatArray) -> FloatArray:
        """1 where a class has a kept attribute, else 0, (n_classes, n_kept)."""
        return np.asarray((embeddings > self.threshold)[:, self.kept > 0], np.float64)

    def report(self) -> dict[str, float]:
        """How many attributes are used, and how many left out for being the same in all seen classes."""
        return {"attributes": float(self.kept.sum()), "constant_attributes": float((self.kept == 0).sum())}


def is_binary(embeddings: FloatArray) -> bool:
    """Whether each unit row holds 0 and one positive value, or plus and minus one value, and nothing else."""
    size = np.abs(embeddings).max(axis=1, keepdims=True)
    full = np.isclose(np.abs(embeddings), size, rtol=1e-4, atol=0)
    return bool((full | ((embeddings == 0) & (embeddings.min() >= 0))).all())


def log_posterior_ratio(log_yes: FloatArray, log_no: FloatArray, has: FloatArray, prior: FloatArray) -> FloatArray:
    """log prod_m p(a_m = a_m^c | x) / p(a_m = a_m^c) for each image and class, (n_images, n_classes).

    log_yes, log_no: (n_images, n_attributes) log-probabilities that the image has the attribute and that it has not.
    """
    prior = prior.astype(np.float64)
    of_class = has @ np.log(prior) + (1 - has) @ np.log1p(-prior)
    return log_yes @ has.T + log_no @ (1 - has).T - of_class
