"""POST /v1/classify: multipart images, one raw image body, or Hugging Face's zero-shot shape."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field, ValidationError

from models.knowledge.names import validate_class_names
from service.answers import ClassifyOut, HuggingFaceRequest, Scope
from service.core.errors import Conflict, Invalid, NotFound, Problem, TooLarge, TooLate, UnsupportedMedia
from service.deps import Parts, PartsDep
from service.image_requests import (
    ImageOptions,
    ImageRequest,
    Timeout,
    ask,
    image_body,
    read_images,
    ready_classifier,
    stated,
    validated,
)
from service.json import FastJSON
from service.openapi import body_schema
from service.problems import documented, invalid
from service.uploads import content_type_of

router = APIRouter(prefix="/v1/classify", tags=["classify"])


class Options(ImageOptions):
    """What a classify request may say beside its images."""

    classifier_id: str | None = Field(None, max_length=40)
    scope: Scope = "all"
    class_names: list[str] | None = None
    top_k: int = Field(5, ge=1, le=100_000)
    gamma: float | None = Field(None, allow_inf_nan=False)
    explain: bool = False
    min_score: float | None = Field(None, ge=0, le=1)


@router.post(
    "",
    response_model=ClassifyOut,
    responses=documented(NotFound, Conflict, TooLarge, UnsupportedMedia, TooLate),
    openapi_extra=image_body(Options, json=body_schema(HuggingFaceRequest)),
)
async def classify(
    request: Request,
    parts: PartsDep,
    classifier_id: Annotated[str | None, Query(max_length=40, description="Default: the newest ready one.")] = None,
    scope: Annotated[Scope | None, Query(description="Which classes compete; default all.")] = None,
    class_names: Annotated[list[str] | None, Query(description="Only these compete; new names are predicted.")] = None,
    top_k: Annotated[int | None, Query(ge=1, le=100_000)] = None,
    gamma: Annotated[
        float | None, Query(allow_inf_nan=False, description="Handicap of seen classes; default: chosen in training.")
    ] = None,
    explain: Annotated[bool | None, Query(description="Add contributing seen classes.")] = None,
    min_score: Annotated[
        float | None, Query(ge=0, le=1, description="Abstain (abstained: true) where the best probability is lower.")
    ] = None,
    timeout_s: Timeout = None,
) -> Response:
    """Recognises seen and unseen classes. Options go in the query, or, with multipart, in the form."""
    given = stated(
        classifier_id=classifier_id,
        scope=scope,
        class_names=class_names,
        top_k=top_k,
        gamma=gamma,
        explain=explain,
        min_score=min_score,
        timeout_s=timeout_s,
    )
    if content_type_of(request) == "application/json":
        return await _classify_hugging_face(request, parts, given)
    images = await read_images(request, parts, given, Options.model_fields)
    return FastJSON(await run(request, parts, _options(images.options), images))


async def _classify_hugging_face(request: Request, parts: Parts, given: dict[str, Any]) -> Response:
    try:
        body = HuggingFaceRequest.model_validate_json(await request.body())
        image = base64.b64decode(body.inputs.partition("base64,")[2] or body.inputs, validate=True)
    except ValidationError as error:
        raise invalid(error.errors(), HuggingFaceRequest) from None
    except binascii.Error:
        raise Invalid("`inputs` must be the image in base64.", problems=[Problem("/inputs", "not base64")]) from None
    labels = body.parameters.candidate_labels
    given |= {"class_names": labels, "top_k": body.parameters.top_k or len(labels)}
    if body.classifier_id:
        given["classifier_id"] = body.classifier_id
    result = (await run(request, parts, _options(given), ImageRequest([image], [None], given)))["data"][0]
    if result["error"]:
        raise Invalid(result["error"], problems=[Problem("/inputs", result["error"])])
    return FastJSON([{"label": p["label"], "score": p["score"]} for p in result["predictions"]])


def _options(given: dict[str, Any]) -> Options:
    options = validated(given, Options)
    if options.class_names is None:
        return options
    if not options.class_names:
        raise Invalid("`class_names` is empty; leave it out to let all classes of the scope compete.")
    names = validate_class_names(options.class_names, field="class_names")
    return options.model_copy(update={"class_names": list(names)})


async def run(request: Request, parts: Parts, options: Options, images: ImageRequest) -> dict[str, Any]:
    """Asks the inference process and shapes its answer."""
    chosen = await ready_classifier(parts, options.classifier_id)
    asked = options.model_dump(exclude={"classifier_id", "min_score"}) | {"classifier": chosen}
    answer, data = await ask(request, parts, parts.inference.classify, asked, images)
    for item in data:
        item.setdefault("explanation", None)
        best = max((p["score"] for p in item["predictions"]), default=None)
        item["abstained"] = best is not None and options.min_score is not None and best < options.min_score
    return {"classifier_id": chosen.id, "scope": options.scope, "gamma": answer["gamma"], "data": data}
