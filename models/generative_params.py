"""Parameters of the classifiers that generate features of unseen classes: frozen classes with defaults and bounds.

No torch here: the API validates requests against these classes and lists them in `GET /v1/methods`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from models.classifier_params import EpochParams

Share = Annotated[float, Field(ge=0, le=1)]
Width = Annotated[int, Field(ge=1, le=16_384)]


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


class TFVAEGANParams(FVAEGANParams):
    """VAE and GAN with a semantic decoder that feeds back to the generator."""

    reconstruction: Literal["l1", "code"] = Field(
        "l1", description="L_R: mean absolute error summed over dimensions, or the authors' code's weighted errors."
    )
    reconstruction_weight: float = Field(0.01, ge=0, le=1e4, description="beta, weight of L_R.")
    train_decoder_on_fake: bool = Field(
        True, description="Let the generator's step train the decoder too; the authors' code does so but on AWA."
    )
    feedback_weight: float = Field(1.0, ge=0, le=100, description="delta, weight of the feedback in training; 0: none.")
    synthesis_feedback_weight: float = Field(1.0, ge=0, le=100, description="The same when features are generated.")
    feedback_learning_rate: float = Field(1e-4, gt=0, le=10, description="Adam's step size for the feedback module.")
    enhanced: bool = Field(
        True, description="Final classifier on features with their decoded embedding and the decoder's hidden units."
    )


class CADAVAEParams(GenerativeParams):
    """Aligned VAEs of features and class embeddings; the final classifier sees latents.

    Ramps are shares of `epochs` between which a weight grows from 0 to its full size; the authors' code: 100 epochs,
    0-93, 21-75 and 6-22.
    """

    batch_size: int = Field(50, ge=2, le=65_536, description="Images a step.")
    learning_rate: float = Field(1.5e-4, gt=0, le=10, description="Adam's (amsgrad) step size.")
    hidden_dims: tuple[Width, Width, Width, Width] | None = Field(
        None,
        description="Hidden widths of feature encoder, feature decoder, embedding encoder and embedding decoder; none: "
        "hidden_dim each; the code: 1560, 1660, 1450, 665.",
    )
    latent_dim: int = Field(64, ge=1, le=4096, description="Width of z.")
    kl_weight: float = Field(0.25, ge=0, le=1e4, description="beta, weight of the KL divergences.")
    cross_weight: float = Field(2.37, ge=0, le=1e4, description="gamma, weight of cross-alignment; 0 leaves it out.")
    align_weight: float = Field(
        8.13, ge=0, le=1e4, description="delta, weight of distribution alignment; 0 leaves it out."
    )
    kl_ramp: tuple[Share, Share] = Field((0.0, 0.93), description="Ramp of beta.")
    cross_ramp: tuple[Share, Share] = Field((0.21, 0.75), description="Ramp of gamma.")
    align_ramp: tuple[Share, Share] = Field((0.06, 0.22), description="Ramp of delta.")
    seen_per_class: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="Latents drawn for each seen class from its images; none: each image's mean, once; the code: 200.",
    )
    code_compat: bool = Field(
        False, description="Draw z as the authors' code does: deviation exp(log variance), one number for all of z."
    )
