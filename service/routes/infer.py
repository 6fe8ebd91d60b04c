"""POST /v1/infer: what an image is like whose class nobody has described."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic import Field

from models.knowledge.names import validate_class_names
from service.answers import InferOut
from service.core.errors import Conflict, Invalid, NotFound, TooLarge, TooLate, UnsupportedMedia
from service.core.repositories import ClassifierState
from service.deps import Parts, PartsDep
from service.image_requests import (
    ImageOptions,
    ask,
    image_operation,
    in_query,
    read_images,
    ready_classifier,
    validated,
)
from service.json import FastJSON
from service.problems import documented

router = APIRouter(prefix="/v1/infer", tags=["classify"])
METHOD = "psr"


class Options(ImageOptions):
    """What an infer request may say beside its images."""

    classifier_id: str | None = Field(None, max_length=40, description="Default: the newest ready PSR one.")
    class_names: list[str] | None = Field(None, min_length=1, description="Compare with these only; default all.")
    tau: float = Field(0.0, ge=-1, le=1, description="Classes of at least this cosine are similar.")
    top_k: int = Field(10, ge=1, le=100_000, description="Of each side, at most.")


@router.post(
    "",
    response_model=InferOut,
    responses=documented(NotFound, Conflict, TooLarge, UnsupportedMedia, TooLate),
    openapi_extra=image_operation(Options),
)
async def infer(request: Request, parts: PartsDep) -> Response:
    """Approximate semantic inference (PSR, 4.5): the known classes that images of unknown ones are like, and unlike."""
    images = await read_images(request, parts, in_query(request, Options), Options)
    options = validated(images, Options)
    with images.pointing():
        names = options.class_names and list(validate_class_names(options.class_names, field="class_names"))
        chosen = await _chosen(parts, options.classifier_id)
        asked = options.model_dump(exclude={"classifier_id"}) | {"classifier": chosen, "class_names": names}
        _, data = await ask(request, parts, parts.inference.infer, asked, images)
    return FastJSON({"classifier_id": chosen.id, "tau": options.tau, "data": data})


async def _chosen(parts: Parts, classifier_id: str | None) -> ClassifierState:
    """The PSR classifier asked for, or the newest ready one; others have no cosines to compare."""
    found = await ready_classifier(parts, classifier_id, METHOD)
    if found.method != METHOD:
        raise Invalid(
            f"Classifier {found.id!r} is of method {found.method!r}; /v1/infer takes {METHOD!r}, whose scores are "
            "cosines."
        )
    return found
