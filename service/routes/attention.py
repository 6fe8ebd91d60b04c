"""POST /v1/classifiers/{id}/attention: where a classifier on feature maps looks, as numbers or as a picture."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from PIL import Image
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from models.catalog import get_method
from models.data.images import ImageLimits, decode_image
from models.data.overlays import SIDE, Tile, sheet
from models.knowledge.names import validate_class_names
from service.answers import AttentionOut
from service.core.errors import Conflict, Invalid, NotFound, TooLarge, TooLate, UnsupportedMedia
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

router = APIRouter(prefix="/v1/classifiers", tags=["classify"])
JPEG = "image/jpeg"


class Options(ImageOptions):
    """What an attention request may say beside its images."""

    class_name: str | None = Field(None, max_length=500, description="Look for this class; default: the likeliest.")
    top_k: int = Field(8, ge=1, le=1000, description="Dimensions to show, the loudest first.")


@router.post(
    "/{classifier_id}/attention",
    response_model=AttentionOut,
    responses={
        200: {"content": {JPEG: {"schema": {"type": "string", "format": "binary"}}}},
        **documented(NotFound, Conflict, TooLarge, UnsupportedMedia, TooLate),
    },
    openapi_extra=image_operation(Options),
)
async def attention(classifier_id: str, request: Request, parts: PartsDep) -> Response:
    """Where the classifier looks in images: all dimensions together, and those that speak loudest for the class.

    Answers numbers, or, to `Accept: image/jpeg` and one image, a picture with the maps laid over it.
    """
    images = await read_images(request, parts, in_query(request, Options), Options)
    options = validated(images, Options)
    if options.class_name is not None:
        with images.pointing():
            (name,) = validate_class_names([options.class_name], field="class_name")
        options = options.model_copy(update={"class_name": name})
    wants_picture = JPEG in request.headers.get("accept", "")
    if wants_picture and len(images.images) != 1:
        raise Invalid(f"A picture shows one image, and {len(images.images)} were sent; send one, or accept JSON.")
    chosen = await ready_classifier(parts, classifier_id)
    if get_method(chosen.method, "classifier").features != "spatial":
        raise Invalid(
            f"Classifier {chosen.id!r} is of method {chosen.method!r}, which does not look at places of an image: it "
            "has no attention maps. Methods that do say so in GET /v1/methods: features 'spatial'."
        )
    asked = {"classifier": chosen, **options.model_dump()}
    with images.pointing(class_names="class_name"):
        _, data = await ask(request, parts, parts.inference.look, asked, images)
    if not wants_picture:
        return FastJSON({"classifier_id": chosen.id, "data": data})
    if data[0]["error"]:
        raise Invalid(f"The image could not be read: {data[0]['error']}")
    picture = await run_in_threadpool(_picture, parts, images.images[0], data[0])
    return Response(picture, media_type=JPEG)


def _picture(parts: Parts, image: bytes, found: dict[str, Any]) -> bytes:
    """A JPEG: the photo, all dimensions together, and each of the loudest."""
    settings = parts.settings
    limits = ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels)
    photo = Image.fromarray(decode_image(image, limits, target_side=2 * SIDE))
    shown = [Tile(photo, found["prediction"]["label"]), Tile(photo, "all dimensions", np.array(found["whole"]))]
    shown += [
        Tile(photo, entry["name"] or f"dimension {entry['index']}", np.array(entry["map"]))
        for entry in found["dimensions"]
    ]
    content = io.BytesIO()
    sheet(shown).save(content, "JPEG", quality=88)
    return content.getvalue()
