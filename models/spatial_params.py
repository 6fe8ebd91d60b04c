"""Parameters of the classifiers that learn by gradient descent from feature maps: frozen classes with bounds and help.

No torch here: the API validates requests against these classes and lists them in `GET /v1/methods`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from models.classifier_params import GradientParams
from models.params import searched

GroupNumber = Annotated[int, Field(ge=0, le=65_535)]


class APNSpatialParams(GradientParams):
    """Attribute prototype network on feature maps; trains the network's last layers too where `mode` says so."""

    mode: Literal["frozen", "finetune"] = Field(
        "frozen",
        description="Train the prototypes on the network's last map, or the network's last layers too, once for each "
        "fold: with `folds` 1 in a fifth of the time.",
    )
    finetuned_share: float = Field(
        0.25, gt=0, le=1, description="Mode finetune: the last part of the network's layers that learns; 1: all."
    )
    warmup_epochs: int = Field(
        8,
        ge=0,
        le=10_000,
        description="Mode finetune: passes over the features as they are before the network learns.",
    )
    backbone_learning_rate: float = Field(
        1e-5, gt=0, le=1, description="Mode finetune: Adam's step size for the network; the code: 1e-6 and less."
    )
    learning_rate: float = Field(
        1e-3,
        gt=0,
        le=10,
        description="Adam's step size for the attributes' vectors.",
        json_schema_extra=searched(1e-4, 1e-2, log=True),
    )
    epochs: int = Field(30, ge=1, le=10_000, description="At most this many; validation classes choose the epoch.")
    batch_size: int = Field(64, ge=1, le=65_536, description="Images a step.")
    normalize: Literal["centered", "zscore", "minmax", "l2", "none"] = Field(
        "none", description="Scaling of whole feature maps, in mode frozen; `unit_places` scales what comes of them."
    )
    unit_places: bool = Field(
        True,
        description="Take the training images' mean off each place and off the pooled map, and bring both to unit "
        "length; false: as they are, as in the paper.",
    )
    pooling: Literal["mean", "max"] = Field(
        "mean", description="How the global branch joins its attributes' maps; the code: max for CUB, else mean."
    )
    scored_by: Literal["global", "prototypes", "both"] = Field(
        "global",
        description="Whose attributes score the classes: the global branch's (paper), the prototypes', or both.",
    )
    double_softmax: bool = Field(False, description="Softmax on the class probabilities again, as the code does.")
    regression_weight: float = Field(
        1.0,
        ge=0,
        le=1e4,
        description="Weight of the attribute regression of the prototypes (Eq. 2).",
        json_schema_extra=searched(0.01, 100, log=True),
    )
    prototype_weight: float = Field(
        1.0, ge=0, le=1e4, description="Weight of the prototypes' own cross-entropy over classes, as the code has it."
    )
    decorrelation_weight: float = Field(
        1e-4, ge=0, le=10, description="Weight of the decorrelation of attribute groups (Eq. 3)."
    )
    compactness_weight: float = Field(
        1e-3, ge=0, le=1e4, description="Weight of the compactness of the prototypes' maps (Eq. 4)."
    )
    attribute_groups: tuple[GroupNumber, ...] | None = Field(
        None,
        max_length=65_536,
        description="Number of the group of each dimension of the class embedding (colour, shape, ...); none: groups "
        "are read from attribute names written 'group::value', and without such names Eq. 3 is the norm of all.",
    )

    @model_validator(mode="after")
    def _check_mode(self) -> Self:
        if self.mode == "finetune" and self.normalize != "none":
            raise ValueError("Mode 'finetune' feeds maps into the network's last layers: 'normalize' must be 'none'.")
        return self
