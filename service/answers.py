"""What requests to classify, predict, infer and look hold, and what they are answered."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.schemas import Body, Id, Name

Scope = Literal["unseen", "seen", "all"]
MAX_GAMMA = 1e30
"""Largest handicap of seen classes, so that scores less it stay finite in float32."""


class HuggingFaceParameters(BaseModel):
    """The `parameters` of Hugging Face's zero-shot-image-classification task."""

    model_config = ConfigDict(extra="ignore")
    candidate_labels: list[str] = Field(min_length=1, max_length=100_000)
    top_k: int | None = Field(None, ge=1, le=100_000)


class HuggingFaceRequest(Body):
    """Hugging Face's zero-shot-image-classification request."""

    inputs: str = Field(description="The image, base64.")
    parameters: HuggingFaceParameters
    classifier_id: Id | None = Field(None, description="Default: the newest ready classifier.")


class Prediction(BaseModel):
    """One label with its calibrated score."""

    label: str
    score: float
    seen: bool


class ImageResult(BaseModel):
    """The answer for one image: predictions, or why there are none."""

    index: int
    filename: str | None
    predictions: list[Prediction]
    error: str | None = None
    explanation: dict[str, Any] | None = None
    abstained: bool = Field(False, description="The best probability is below the request's min_score.")


class ClassifyOut(BaseModel):
    """Predictions for each image, in the order sent."""

    classifier_id: str
    scope: Scope
    gamma: float
    data: list[ImageResult]


class PredictionsCreate(Body):
    """Classify all images of a dataset in a job."""

    name: Name | None = None
    classifier_id: Id | None = Field(None, description="Default: the newest ready one.")
    dataset_id: Id = Field(description="Images; an archive becomes a dataset first, in folders by any names.")
    only_classes: list[str] | None = Field(None, min_length=1, description="Only the dataset's images of these.")
    scope: Scope = Field("all", description="Which classes compete.")
    class_names: list[str] | None = Field(
        None, min_length=1, description="Only these compete; new names are predicted."
    )
    top_k: int = Field(5, ge=1, le=1000)
    gamma: float | None = Field(
        None, ge=-MAX_GAMMA, le=MAX_GAMMA, allow_inf_nan=False, description="Handicap of seen classes; default: chosen."
    )
    min_score: float | None = Field(None, ge=0, le=1, description="Abstain where the best probability is lower.")


class PredictionsOut(BaseModel):
    """What was said of a dataset's images, all together."""

    id: str
    name: str
    classifier_id: str
    dataset_id: str
    request: dict[str, Any]
    status: Literal["queued", "ready", "failed"]
    summary: dict[str, Any] = Field(
        description="n_images, n_failed, n_abstained; labels: how many images of each; agreement: T1 (mean over "
        "classes) on the images whose class competed; images_per_s of those whose features were not there yet."
    )
    job_id: str | None
    created_at: datetime


class PredictedImage(BaseModel):
    """The predictions for one image of a dataset, or why there are none."""

    index: int
    image_id: str
    filename: str
    class_name: str = Field(description="Its class in the dataset.")
    predictions: list[Prediction]
    error: str | None
    abstained: bool


class Relatives(BaseModel):
    """The known classes one image is like and unlike, by cosine, the strongest first; or why it could not be read."""

    index: int
    filename: str | None
    similar: list[Prediction]
    dissimilar: list[Prediction]
    error: str | None = None


class DimensionAttention(BaseModel):
    """One dimension of the class embedding and where in the image the classifier looks for it."""

    index: int
    name: str | None = Field(description="What the dimension means, where the knowledge or the request said so.")
    strength: float = Field(description="How much it adds to the class's score; the largest come first.")
    map: list[list[float]] = Field(description="Shares of the image's places, row by row; they sum to 1.")


class ImageAttention(BaseModel):
    """Where the classifier looks in one image, or why it could not be read."""

    index: int
    filename: str | None
    prediction: Prediction | None = Field(description="The class it looks for: the one asked for, else the likeliest.")
    whole: list[list[float]] | None = Field(description="The mean over all dimensions.")
    dimensions: list[DimensionAttention]
    error: str | None = None


class AttentionOut(BaseModel):
    """Attention maps of each image, in the order sent. A map covers the whole image, however oblong that is."""

    classifier_id: str
    data: list[ImageAttention]


class InferOut(BaseModel):
    """Relatives of each image, in the order sent."""

    classifier_id: str
    tau: float
    data: list[Relatives]
