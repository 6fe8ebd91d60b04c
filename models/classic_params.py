"""Parameters of the classic classifiers, solved and not trained: frozen classes with defaults, bounds and help.

No torch here: the API validates requests against these classes and lists them in `GET /v1/methods`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from models.params import Params


class ClassicParams(Params):
    """What every one of them takes."""

    normalize: Literal["centered", "minmax", "l2", "none"] = Field(
        "centered", description="Scaling of the image features."
    )
    folds: int = Field(
        5,
        ge=1,
        le=100,
        description="Groups of seen classes that take turns as unseen while settings are chosen, the validation "
        "classes first; 1: the validation classes alone.",
    )


class SAEParams(ClassicParams):
    """Semantic autoencoder, closed form."""

    lamda: float | None = Field(
        None, gt=0, le=1e12, description="Weight of the encoder's error; empty: chosen on validation classes."
    )
    direction: Literal["feature_to_semantic", "semantic_to_feature"] | None = Field(
        None, description="Where features and embeddings are compared; empty: chosen on validation classes."
    )


class RidgeParams(ClassicParams):
    """What every method that rests on linear classifiers takes."""

    lamda: float | None = Field(
        None,
        gt=0,
        le=1e12,
        description="Ridge on the linear classifiers' weights, beside the mean loss over images; empty: chosen on "
        "validation classes.",
    )


class ConSEParams(RidgeParams):
    """Convex combination of the embeddings of the likeliest seen classes."""

    top: int | None = Field(
        None, ge=1, le=100_000, description="T: seen classes combined; empty: chosen on validation classes."
    )


class SynCParams(RidgeParams):
    """Classifiers synthesised from those of phantom classes."""

    loss: Literal["one_versus_other", "crammer_singer", "structured"] = Field(
        "one_versus_other",
        description="Squared hinge of each class against the rest; hinge of the worst wrong class; the same with "
        "margins by the distance of the classes' embeddings.",
    )
    sigma: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Fall-off of a phantom class's weight with distance, of unit embeddings; empty: chosen on "
        "validation classes.",
    )


class DAPParams(RidgeParams):
    """Direct attribute prediction: a classifier an attribute."""


class IAPParams(RidgeParams):
    """Indirect attribute prediction: attributes by way of a classifier of seen classes."""


class SSEParams(ClassicParams):
    """Classes and images as mixtures of seen classes."""

    gamma: float | None = Field(
        None, gt=0, le=1e6, description="Ridge on a class's mixture; larger: more even; empty: chosen on validation."
    )
    lamda: float | None = Field(
        None, gt=0, le=1e12, description="Ridge on the weights of features; empty: chosen on validation classes."
    )
    steps: int = Field(500, ge=1, le=100_000, description="Subgradient steps of 64 images each.")
