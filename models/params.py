"""Every method's parameters: one frozen class each, with the paper's defaults, bounds and a sentence of help.

No torch here: the API validates requests against these classes and lists them in `GET /v1/methods`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Params(BaseModel):
    """Base of all parameter classes: immutable; unknown names, NaN and infinity refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def searched(
    low: float | None = None, high: float | None = None, *, log: bool = False, choices: Sequence[str] = ()
) -> dict[str, Any]:
    """Marks a parameter as one that matters, for `search`: the range or the choices to look through."""
    return {"search": {"choices": list(choices)} if choices else {"low": low, "high": high, "log": log}}


def search_space(params: type[Params]) -> dict[str, dict[str, Any]]:
    """Name -> range or choices of the parameters of a method that `search` looks through."""
    found = {}
    for name, field in params.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and isinstance(space := extra.get("search"), dict):
            found[name] = dict(space)
    return found


class BackboneParams(Params):
    """The network that turns pixels into features."""

    name: str = Field("resnet50", max_length=64, description="Any torchvision classification network, or 'small_cnn'.")
    weights: str = Field(
        "imagenet",
        max_length=255,
        description="'imagenet': torchvision's default weights, downloaded and checksum-verified; "
        "'scratch': train on the seen classes (small_cnn only); 'random': untrained; "
        "otherwise the name of a .pth or .safetensors file in the server's weights directory.",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Arithmetic of the forward pass.")


class PatchParams(Params):
    """How an image is cut into patches (VGSE section 3.1)."""

    method: Literal["watershed", "grid", "whole"] = Field(
        "watershed", description="Compact watershed segments' bounding boxes, a regular grid, or the whole image."
    )
    n_patches: int = Field(9, ge=1, le=128, description="Markers of the watershed, or cells of the grid (about).")
    compactness: float = Field(
        1e-3, ge=0, le=1, description="Compactness of the watershed; 0.1 is practically the regular grid."
    )
    size: int = Field(224, ge=16, le=1024, description="Side in pixels to which each patch is resized.")


class ScratchParams(Params):
    """Training of the small backbone on the seen classes, where no pretrained weights are given."""

    epochs: int = Field(30, ge=1, le=1000, description="Passes over the training images.")
    learning_rate: float = Field(3e-3, gt=0, le=1, description="Peak of the one-cycle schedule.")
    batch_size: int = Field(64, ge=2, le=4096, description="Images a step.")


FINETUNED_COST = 8.0
"""Time of a patch in one epoch of fine-tuning, as a multiple of its feature extraction: a neighbour, both ways."""


class ClusteringParams(Params):
    """Patch clustering of VGSE (Eq. 1-8); loss weights and schedule are ours, the paper does not print them."""

    n_clusters: int = Field(150, ge=2, le=10_000, description="Dv: visual properties, the embedding's dimension.")
    n_neighbors: int = Field(20, ge=1, le=1000, description="Nearest patches that must share a cluster (Eq. 2).")
    entropy_weight: float = Field(3.0, ge=0, le=1e4, description="lambda of L_pel (Eq. 3, 6).")
    class_weight: float = Field(1.0, ge=0, le=1e4, description="beta of L_cls (Eq. 4, 6); 0 leaves it out.")
    semantic_weight: float = Field(1.0, ge=0, le=1e4, description="gamma of L_sem (Eq. 5, 6); 0 leaves it out.")
    squared_semantic: bool = Field(False, description="Square the norm of Eq. 5.")
    double_softmax: bool = Field(False, description="Softmax on the class probabilities again, as Eq. 4 is printed.")
    head_input: Literal["assignment", "logits"] = Field(
        "assignment", description="What the class and semantic heads read: softmax assignments (paper) or raw scores."
    )
    mode: Literal["frozen", "finetune"] = Field(
        "frozen", description="Train the heads on cached features, or the backbone too, end to end."
    )
    warmup_epochs: int = Field(
        8, ge=0, le=10_000, description="Mode finetune: passes over the features as they are before the network learns."
    )
    finetuned_share: float = Field(
        0.25,
        gt=0,
        le=1,
        description="Mode finetune: the last part of the network's layers that learns; 1: all of them.",
    )
    backbone_learning_rate: float = Field(
        3e-4, gt=0, le=1, description="Mode finetune: Adam's step size for the network."
    )
    epochs: int = Field(
        50, ge=1, le=10_000, description="At most this many passes; validation classes may stop sooner."
    )
    batch_size: int = Field(512, ge=2, le=65_536, description="Patches a step; the entropy needs many more than Dv.")
    learning_rate: float = Field(5e-3, gt=0, le=10, description="Adam's step size.")
    weight_decay: float = Field(1e-4, ge=0, le=1, description="Adam's weight decay.")
    early_stopping: bool = Field(True, description="Choose the epoch on validation classes cut from the seen ones.")
    patience: int = Field(15, ge=1, le=1000, description="Epochs without a better validation score before stopping.")


class KMeansParams(Params):
    """k-means over patch features (the paper's k-means-SMO baseline)."""

    n_clusters: int = Field(150, ge=2, le=10_000, description="Number of centres, the embedding's dimension.")
    max_iterations: int = Field(100, ge=1, le=10_000, description="Lloyd iterations at most.")


ALL_NEIGHBORS = 10_000
"""So many neighbours that WAvg averages over every seen class; also the most that can be asked for."""


class RelationParams(Params):
    """How unseen classes are composed of seen ones (VGSE section 3.2)."""

    alpha: Literal[-1, 0] = Field(0, description="SMO's lower bound on a coefficient (Eq. 11).")
    ridge: float = Field(1e-6, ge=0, le=1e3, description="SMO: ridge on the coefficients; keeps the answer unique.")
    n_neighbors: int = Field(
        5, ge=1, le=ALL_NEIGHBORS, description="WAvg: nearest seen classes (Eq. 9); 10000: all of them."
    )
    eta: float = Field(5.0, ge=0, le=1e3, description="WAvg: fall-off of the weight with distance (Eq. 10).")
    form: Literal["plain", "centred", "fused"] = Field(
        "plain",
        description="plain: the paper's vector; centred: minus the seen mean; fused: centred, then joined with the "
        "centred knowledge vector, each part of unit length.",
    )


class EmbeddingSetParams(Params):
    """All parameters of an embedding set."""

    backbone: BackboneParams = BackboneParams()
    scratch: ScratchParams = ScratchParams()
    patches: PatchParams = PatchParams()
    clustering: ClusteringParams = ClusteringParams()
    kmeans: KMeansParams = KMeansParams()
    relation: RelationParams = RelationParams()
    validation_classes: tuple[str, ...] | None = Field(
        None, max_length=100_000, description="Seen classes held out to choose by; default: a seeded fifth of them."
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of everything random.")


class ESZSLParams(Params):
    """Embarrassingly simple zero-shot learning, closed form."""

    gamma: float | None = Field(
        None, gt=0, le=1e12, description="Ridge on features; empty: chosen on validation classes."
    )
    lamda: float | None = Field(
        None, gt=0, le=1e12, description="Ridge on embeddings; empty: chosen on validation classes."
    )
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


class SearchParams(Params):
    """Search for a classifier's parameters on validation classes; those given in `params` stay as they are."""

    trials: int = Field(20, ge=1, le=1000, description="At most this many settings; the defaults are the first.")
    seconds: float = Field(600.0, gt=0, le=7 * 86_400, description="No trial is begun after this time.")
    metric: Literal["h", "t1"] = Field("h", description="What counts, on seen classes treated as unseen.")
