"""What classify and infer requests hold, and what they are answered."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.schemas import Body, Id


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
    scope: Literal["unseen", "seen", "all"]
    gamma: float
    data: list[ImageResult]


class Relatives(BaseModel):
    """The known classes one image is like and unlike, by cosine, the strongest first; or why it could not be read."""

    index: int
    filename: str | None
    similar: list[Prediction]
    dissimilar: list[Prediction]
    error: str | None = None


class InferOut(BaseModel):
    """Relatives of each image, in the order sent."""

    classifier_id: str
    tau: float
    data: list[Relatives]
