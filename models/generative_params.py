"""Parameters of the classifiers that generate features of unseen classes: frozen classes with defaults and bounds.

No torch here: the API validates requests against these classes and lists them in `GET /v1/methods`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from models.classifier_params import EpochParams
from models.params import searched

Share = Annotated[float, Field(ge=0, le=1)]
Width = Annotated[int, Field(ge=1, le=16_384)]


class GenerativeParams(EpochParams):
    """What every classifier takes that generates features of unseen classes and learns a final classifier on them."""

    epochs: int = Field(60, ge=1, le=10_000, description="At most this many; validation classes choose the epoch.")
    steps_per_epoch: int = Field(
        50, ge=1, le=100_000, description="Steps of the generator after which the epoch counts as over."
    )
    patience: int = Field(10, ge=1, le=10_000, description="Epochs without a better validation score before stopping.")
    batch_size: int = Field(128, ge=2, le=65_536, description="Images a step.")
    learning_rate: float = Field(
        1e-4, gt=0, le=10, description="Adam's step size.", json_schema_extra=searched(1e-4, 3e-3, log=True)
    )
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
    hidden_dim: int = Field(512, ge=1, le=16_384, description="Width of hidden layers; the papers: 4096.")
    synthetic_per_class: int = Field(300, ge=1, le=10_000, description="Generated features of each unseen class.")
    final: Literal["lda", "softmax", "svm", "nearest_mean", "nearest"] = Field(
        "lda",
        description="Final classifier: linear discriminants (closed form; a class's score does not depend on the "
        "others), linear softmax or SVM (trained again for each set of classes), nearest class mean or nearest row by "
        "cosine.",
    )
    shrinkage: float | None = Field(
        None,
        gt=0,
        le=1,
        description="lda: share of the identity in the covariance; none: chosen on validation classes, 0.3 without.",
    )
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

    gan_weight: float = Field(
        10.0,
        ge=0,
        le=1e6,
        description="gamma, weight of the critic in the generator's loss.",
        json_schema_extra=searched(0.3, 300, log=True),
    )


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


class SCEGGParams(TFVAEGANParams):
    """Features compressed from those of attributes, generated by TF-VAEGAN's networks."""

    batch_size: int = Field(64, ge=2, le=65_536, description="Images a step.")
    normalize: Literal["centered", "zscore", "minmax", "l2", "none"] = Field(
        "none", description="Scaling of whole feature maps; what the generator learns is scaled to [0, 1] besides."
    )
    unit_places: bool = Field(True, description="Bring each place of the map to unit length, as the code does.")
    vector_dim: int = Field(300, ge=1, le=4096, description="Width of the vectors v_n, where none are given.")
    center_vectors: bool = Field(
        True,
        description="Take the mean off given vectors v_n: words have much in common, and all dimensions of the class "
        "embedding would look at the same places.",
    )
    embedding_epochs: int = Field(20, ge=1, le=10_000, description="Passes over the images in stage 1.")
    compression_epochs: int = Field(20, ge=0, le=10_000, description="The same in stage 2; 0 leaves L_SCR out.")
    embedding_learning_rate: float = Field(
        1e-3, gt=0, le=10, description="Step size in stages 1 and 2; the paper: 0.0001."
    )
    local_weight: float = Field(1.0, ge=0, le=1e4, description="Weight of L_LCE; 0 leaves it out.")
    global_weight: float = Field(1.0, ge=0, le=1e4, description="lambda_g, weight of L_GCE; 0 leaves it out.")
    guidance_weight: float = Field(0.1, ge=0, le=1e4, description="lambda_s, weight of L_EGS; 0 leaves it out.")
    code_compat: bool = Field(
        False,
        description="Where the authors' code differs: RMSprop in stages 1 and 2; from stage 2 on the mean over "
        "dimensions for SC and a new, two-layer CLS_g; L_SCR as a mean.",
    )


class CADAVAEParams(GenerativeParams):
    """Aligned VAEs of features and class embeddings; the final classifier sees latents.

    Ramps are shares of `epochs` between which a weight grows from 0 to its full size; the authors' code: 100 epochs,
    0-93, 21-75 and 6-22. With few steps, and z drawn as it should be, their weights of the KL divergences and of
    distribution alignment leave the latents empty: both encoders agree before they have learned anything.
    """

    batch_size: int = Field(50, ge=2, le=65_536, description="Images a step.")
    learning_rate: float = Field(1e-3, gt=0, le=10, description="Adam's (amsgrad) step size; the code: 0.00015.")
    hidden_dims: tuple[Width, Width, Width, Width] | None = Field(
        None,
        description="Hidden widths of feature encoder, feature decoder, embedding encoder and embedding decoder; none: "
        "hidden_dim each; the code: 1560, 1660, 1450, 665.",
    )
    latent_dim: int = Field(16, ge=1, le=4096, description="Width of z; the code: 64.")
    kl_weight: float = Field(0.05, ge=0, le=1e4, description="beta, weight of the KL divergences; the code: 0.25.")
    cross_weight: float = Field(2.37, ge=0, le=1e4, description="gamma, weight of cross-alignment; 0 leaves it out.")
    align_weight: float = Field(
        1.0, ge=0, le=1e4, description="delta, weight of distribution alignment; 0 leaves it out; the code: 8.13."
    )
    kl_ramp: tuple[Share, Share] = Field((0.0, 0.93), description="Ramp of beta.")
    cross_ramp: tuple[Share, Share] = Field((0.21, 0.75), description="Ramp of gamma.")
    align_ramp: tuple[Share, Share] = Field((0.06, 0.22), description="Ramp of delta.")
    seen_per_class: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="Latents drawn for each seen class from its images; none: one for each image; the code: 200.",
    )
    code_compat: bool = Field(
        False, description="Draw z as the authors' code does: deviation exp(log variance), one number for all of z."
    )


class SEGZSLParams(GANParams):
    """Semantic features cut out of image features first, then a Wasserstein GAN guided by them.

    Widths, rates and lengths are ours: the paper prints the weights of its losses, 4096 hidden units and the slope.
    """

    semantic_dim: int = Field(256, ge=1, le=8192, description="Width of semantic and residual features.")
    slope: float = Field(0.02, ge=0, le=1, description="Of the leaky ReLUs below 0.")
    decomposition_epochs: int = Field(
        10, ge=1, le=10_000, description="Epochs of the encoders, which are trained first, of steps_per_epoch each."
    )
    decomposition_learning_rate: float = Field(1e-3, gt=0, le=10, description="Adam's step size for them.")
    images_per_class: int = Field(
        8, ge=1, le=4096, description="Images of each class in a step of the encoders: L_sim needs several."
    )
    guess_steps: int = Field(
        1,
        ge=1,
        le=100,
        description="Steps of the network that guesses embeddings from z_r, for CLUB, for each of the encoders; "
        "CLUB's code: 5.",
    )
    use_information: bool = Field(True, description="L_MI, and its part in the generator's loss (table 3).")
    information_weight: float = Field(20.0, ge=0, le=1e4, description="lambda_s, weight of InfoNCE (Eq. 6).")
    leak_weight: float = Field(50.0, ge=0, le=1e4, description="lambda_r, weight of CLUB (Eq. 6); 0 leaves it out.")
    use_similarity: bool = Field(True, description="L_sim, and its part in the generator's loss (table 3).")
    similarity_weight: float = Field(1.0, ge=0, le=1e4, description="lambda_sim, weight of L_sim (Eq. 11).")
    residual_encoder: bool = Field(True, description="A residual feature beside the semantic one (table 4).")
    generator_information_weight: float = Field(1.0, ge=0, le=1e4, description="lambda_G,MI (Eq. 16).")
    generator_similarity_weight: float = Field(0.025, ge=0, le=1e4, description="lambda_G,sim (Eq. 16).")
    representation: Literal["semantic", "image"] = Field(
        "semantic", description="What the final classifier sees: semantic features, or whole image features (table 1)."
    )
