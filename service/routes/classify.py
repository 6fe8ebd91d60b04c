"""POST /v1/classify: multipart images, one raw image body, or Hugging Face's zero-shot shape."""

from __future__ import annotations

import base64
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field, ValidationError

from models.knowledge.names import validate_class_names
from service.answers import MAX_GAMMA, ClassifyOut, HuggingFaceRequest, Scope
from service.core.errors import Conflict, Invalid, NotFound, Problem, TooLarge, TooLate, UnsupportedMedia
from service.deps import Parts, PartsDep
from service.image_requests import (
    ImageOptions,
    ImageRequest,
    ask,
    image_operation,
    in_query,
    in_the_query,
    read_images,
    ready_classifier,
    validated,
)
from service.json import FastJSON
from service.openapi import body_schema
from service.problems import documented, invalid
from service.uploads import content_type_of

router = APIRouter(prefix="/v1/classify", tags=["classify"])


class Options(ImageOptions):
    """What a classify request may say beside its images."""

    classifier_id: str | None = Field(None, max_length=40, description="Default: the newest ready one.")
    scope: Scope = Field("all", description="Which classes compete.")
    class_names: list[str] | None = Field(None, description="Only these compete; new names are predicted.")
    top_k: int = Field(5, ge=1, le=100_000)
    gamma: float | None = Field(
        None,
        ge=-MAX_GAMMA,
        le=MAX_GAMMA,
        allow_inf_nan=False,
        description="Handicap of seen classes; default: chosen in training.",
    )
    explain: bool = Field(False, description="Add contributing seen classes.")
    min_score: float | None = Field(
        None, ge=0, le=1, description="Abstain (abstained: true) where the best probability is lower."
    )


@router.post(
    "",
    response_model=ClassifyOut,
    responses=documented(NotFound, Conflict, TooLarge, UnsupportedMedia, TooLate),
    openapi_extra=image_operation(Options, json=body_schema(HuggingFaceRequest)),
)
async def classify(request: Request, parts: PartsDep) -> Response:
    """Recognises seen and unseen classes. Options go in the query, or, with multipart, in the form."""
    given = in_query(request, Options)
    if content_type_of(request) == "application/json":
        return await _classify_hugging_face(request, parts, given)
    images = await read_images(request, parts, given, Options)
    return FastJSON(await run(request, parts, images))


async def _classify_hugging_face(request: Request, parts: Parts, given: dict[str, Any]) -> Response:
    try:
        body = HuggingFaceRequest.model_validate_json(await request.body())
        image = base64.b64decode(body.inputs.partition("base64,")[2] or body.inputs, validate=True)
    except ValidationError as error:
        raise invalid(error.errors(), HuggingFaceRequest) from None
    except ValueError:  # binascii.Error is one, too; characters past ASCII raise it plain
        raise Invalid("`inputs` must be the image in base64.", problems=[Problem("/inputs", "not base64")]) from None
    labels = body.parameters.candidate_labels
    given |= {"class_names": labels, "top_k": body.parameters.top_k or len(labels)}
    places = in_the_query(given) | {"class_names": ("parameters", "candidate_labels"), "top_k": ("parameters", "top_k")}
    if body.classifier_id:
        given["classifier_id"] = body.classifier_id
        places.pop("classifier_id", None)
    result = (await run(request, parts, ImageRequest([image], [None], given, places)))["data"][0]
    if result["error"]:
        raise Invalid(result["error"], problems=[Problem("/inputs", result["error"])])
    return FastJSON([{"label": p["label"], "score": p["score"]} for p in result["predictions"]])


def _names(given: list[str] | None) -> list[str] | None:
    if given is None:
        return None
    if not given:
        raise Invalid("`class_names` is empty; leave it out to let all classes of the scope compete.")
    return list(validate_class_names(given, field="class_names"))


async def run(request: Request, parts: Parts, images: ImageRequest) -> dict[str, Any]:
    """Asks the inference process and shapes its answer."""
    options = validated(images, Options)
    with images.pointing():
        names = _names(options.class_names)
        chosen = await ready_classifier(parts, options.classifier_id)
        asked = options.model_dump(exclude={"classifier_id", "min_score"}) | {
            "classifier": chosen,
            "class_names": names,
        }
        answer, data = await ask(request, parts, parts.inference.classify, asked, images)
    for item in data:
        item.setdefault("explanation", None)
        best = max((p["score"] for p in item["predictions"]), default=None)
        item["abstained"] = best is not None and options.min_score is not None and best < options.min_score
    return {"classifier_id": chosen.id, "scope": options.scope, "gamma": answer["gamma"], "data": data}
