"""Parameters of the classifiers that learn by gradient descent: frozen classes with defaults, bounds and help.

No torch here: the API validates requests against these classes and lists them in `GET /v1/methods`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from models.params import Params, searched


class EpochParams(Params):
    """What every classifier that learns in epochs takes."""

    epochs: int = Field(100, ge=1, le=10_000, description="At most this many; validation classes choose the epoch.")
    batch_size: int = Field(256, ge=1, le=65_536, description="Images a step.")
    learning_rate: float = Field(
        3e-3, gt=0, le=10, description="Adam's step size.", json_schema_extra=searched(3e-4, 3e-2, log=True)
    )
    weight_decay: float = Field(0.0, ge=0, le=1, description="Adam's weight decay.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Matrix products of training steps; auto: bf16 on GPUs that have it, else fp32."
    )
    normalize: Literal["centered", "zscore", "minmax", "l2", "none"] = Field(
        "centered",
        description="Scaling of the image features.",
        json_schema_extra=searched(choices=("centered", "zscore", "minmax", "l2")),
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


class GradientParams(EpochParams):
    """What every classifier takes that learns a compatibility by gradient descent."""

    precision: Literal["auto", "fp32", "bf16"] = Field(
        "fp32", description="Matrix products of training steps; auto: bf16 on GPUs that have it, else fp32."
    )


class SJEParams(GradientParams):
    """Structured joint embedding, bilinear compatibility."""

    loss: Literal["ce", "double_softmax", "hinge"] = Field(
        "ce", description="Cross-entropy, the VGSE code's softmax twice, or the original structured hinge."
    )
    weight_penalty: float = Field(0.0, ge=0, le=10, description="Weight of ||W||_F in the loss.")
    scale: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="Multiplies the scores before the softmax (temperature).",
        json_schema_extra=searched(0.3, 30, log=True),
    )


class ALEParams(GradientParams):
    """Attribute label embedding: bilinear compatibility by weighted ranking."""

    margin: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="By how much the right class must lead (Eq. 8: 1).",
        json_schema_extra=searched(0.03, 3, log=True),
    )


class DeViSEParams(GradientParams):
    """Deep visual-semantic embedding: bilinear compatibility by a sum of hinges."""

    margin: float = Field(
        0.1,
        gt=0,
        le=1000,
        description="By how much the right class must lead (paper: 0.1).",
        json_schema_extra=searched(0.01, 1, log=True),
    )


class LATEMParams(GradientParams):
    """Latent embeddings: the best of several bilinear maps."""

    n_maps: int = Field(
        4,
        ge=1,
        le=100,
        description="K: bilinear maps; the paper chooses among 2 to 10.",
        json_schema_extra=searched(2, 10),
    )
    margin: float = Field(1.0, gt=0, le=1000, description="By how much the right class must lead (Eq. 3: 1).")


class CMTParams(GradientParams):
    """Cross-modal transfer: regression onto class embeddings through one tanh layer."""

    hidden_dim: int = Field(
        100, ge=1, le=65_536, description="Width of the tanh layer.", json_schema_extra=searched(30, 1000, log=True)
    )
    novelty: bool = Field(
        False, description="CMT*: images unlikely for all seen classes go to unseen ones, all others to seen ones."
    )
    novelty_share: float = Field(
        0.05, gt=0, lt=1, description="CMT*: share of a class's training images that its threshold leaves out."
    )


class GEMZSLParams(GradientParams):
    """GEM-ZSL on global features: softmax of scaled cosines."""

    scale: float = Field(
        20.0,
        gt=0,
        le=1000,
        description="s, multiplies the cosine before the softmax.",
        json_schema_extra=searched(5, 60, log=True),
    )


class APNParams(GradientParams):
    """Attribute prototype network on global features."""

    double_softmax: bool = Field(False, description="Softmax on the class probabilities again, as the code does.")
    regression_weight: float = Field(
        1.0,
        ge=0,
        le=1e4,
        description="Weight of the attribute regression (Eq. 2).",
        json_schema_extra=searched(0.01, 100, log=True),
    )
    decorrelation_weight: float = Field(1e-4, ge=0, le=10, description="Weight of ||V||_F in the loss.")


class PSRParams(GradientParams):
    """Preserving semantic relations: encoder-decoder trained on mined tuples of images."""

    variant: Literal["full", "B1", "B2", "B3"] = Field(
        "full", description="The method, or its baselines: B1 squared error, B2 no similar classes, B3 no decoder."
    )
    tau: float = Field(
        0.0,
        ge=-1,
        lt=1,
        description="Classes with at least this cosine are similar.",
        json_schema_extra=searched(-0.2, 0.4),
    )
    lambda1: float = Field(
        1.0,
        ge=0,
        le=1e4,
        description="Weight of O2, similar classes (Eq. 5).",
        json_schema_extra=searched(0.1, 10, log=True),
    )
    lambda2: float = Field(
        0.1,
        ge=0,
        le=1e4,
        description="Weight of O3, reconstruction (Eq. 5).",
        json_schema_extra=searched(0.01, 1, log=True),
    )
    n_candidates: int = Field(50, ge=1, le=10_000, description="p: images drawn, of which the hardest is taken.")
    hidden_dims: tuple[Annotated[int, Field(ge=1, le=16_384)], ...] = Field(
        (1024,),
        min_length=1,
        max_length=4,
        description="Widths of the encoder's hidden layers, the decoder's backwards; the paper: 1024, or 512, 1024.",
    )
    output: Literal["elu", "linear"] = Field("elu", description="Activation of the encoder's and decoder's output.")
    learning_rate: float = Field(1e-3, gt=0, le=10, description="Adam's step size.")
    weight_decay: float = Field(5e-5, ge=0, le=1, description="Adam's weight decay.")
    normalize: Literal["centered", "zscore", "minmax", "l2", "none"] = Field(
        "zscore", description="Scaling of the image features."
    )
