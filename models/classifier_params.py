"""Parameters of the classifiers that learn by gradient descent: frozen classes with defaults, bounds and help.

No torch here: the API validates requests against these classes and lists them in `GET /v1/methods`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from models.params import Params


class GradientParams(Params):
    """What every classifier that learns by gradient descent takes."""

    epochs: int = Field(100, ge=1, le=10_000, description="At most this many; validation classes choose the epoch.")
    batch_size: int = Field(256, ge=1, le=65_536, description="Images a step.")
    learning_rate: float = Field(3e-3, gt=0, le=10, description="Adam's step size.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="Adam's weight decay.")
    normalize: Literal["centered", "zscore", "minmax", "l2", "none"] = Field(
        "centered", description="Scaling of the image features."
    )
    early_stopping: bool = Field(True, description="Choose the epoch on validation classes, then refit on all.")
    patience: int = Field(20, ge=1, le=10_000, description="Epochs without a better validation score before stopping.")
    folds: int = Field(
        5,
        ge=1,
        le=100,
        description="Groups of seen classes that take turns as unseen while settings are chosen, the validation "
        "classes first; 1: the validation classes alone.",
    )


class SJEParams(GradientParams):
    """Structured joint embedding, bilinear compatibility."""

    loss: Literal["ce", "double_softmax", "hinge"] = Field(
        "ce", description="Cross-entropy, the VGSE code's softmax twice, or the original structured hinge."
    )
    weight_penalty: float = Field(0.0, ge=0, le=10, description="Weight of ||W||_F in the loss.")
    scale: float = Field(1.0, gt=0, le=1000, description="Multiplies the scores before the softmax (temperature).")
