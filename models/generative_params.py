"""Parameters of the classifiers that generate features of unseen classes: frozen classes with defaults and bounds.

No torch here: the API validates requests against these classes and lists them in `GET /v1/methods`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from models.classifier_params import EpochParams


class GenerativeParams(EpochParams):
    """What every classifier takes that generates features of unseen classes and learns a final classifier on them."""

    epochs: int = Field(60, ge=1, le=10_000, description="At most this many; validation classes choose the epoch.")
    steps_per_epoch: int = Field(
        50, ge=1, le=100_000, description="Steps of the generator after which the epoch counts as over."
    )
    batch_size: int = Field(128, ge=2, le=65_536, description="Images a step.")
    learning_rate: float = Field(1e-4, gt=0, le=10, description="Adam's step size.")
    normalize: Literal["centered", "zscore", "minmax", "l2", "none"] = Field(
        "minmax", description="Scaling of the image features."
    )
    folds: int = Field(
        1,
        ge=1,
        le=100,
        description="Groups of seen classes that take turns as unseen while settings are chosen, the validation "
        "classes first; 1: the validation classes alone.",
    )
    hidden_dim: int = Field(1024, ge=1, le=16_384, description="Width of hidden layers; the papers: 4096.")
    synthetic_per_class: int = Field(300, ge=1, le=10_000, description="Generated features of each unseen class.")
    final: Literal["lda", "softmax", "svm", "nearest_mean", "nearest"] = Field(
        "lda",
        description="Final classifier: linear discriminants (closed form; a class's score does not depend on the "
        "others), linear softmax or SVM (trained again for each set of classes), nearest class mean or nearest row by "
        "cosine.",
    )
    shrinkage: float = Field(0.1, gt=0, le=1, description="lda: share of the identity in the covariance.")
    final_epochs: int = Field(25, ge=1, le=1000, description="softmax: passes over real and generated features.")
    final_learning_rate: float = Field(1e-3, gt=0, le=10, description="softmax: Adam's step size.")
    svm_cost: float = Field(1.0, gt=0, le=1e4, description="svm: C, the weight of the hinge losses.")


class GANParams(GenerativeParams):
    """What every method with a Wasserstein critic takes."""

    noise_dim: int | None = Field(None, ge=1, le=4096, description="Width of z; none: as wide as the class embedding.")
    critic_steps: int = Field(5, ge=1, le=100, description="Steps of the critic for each of the generator.")
    penalty_weight: float = Field(10.0, ge=0, le=1e4, description="Weight of the gradient penalty.")


class FCLSWGANParams(GANParams):
    """Feature-generating Wasserstein GAN with a classification loss."""

    class_weight: float = Field(0.01, ge=0, le=1e4, description="beta, weight of the classification loss (Eq. 4).")
    class_epochs: int = Field(20, ge=1, le=1000, description="Passes of the softmax on seen classes, trained first.")


class FVAEGANParams(GANParams):
    """Feature-generating VAE and GAN with one decoder, inductive."""

    gan_weight: float = Field(10.0, ge=0, le=1e6, description="gamma, weight of the critic in the generator's loss.")
