"""POST /v1/classify: multipart images, one raw image body, or Hugging Face's zero-shot shape."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool

from models.knowledge.names import validate_class_names
from service.core import repositories
from service.core.errors import Conflict, Invalid, NotFound, Problem, TooLarge, UnsupportedMedia
from service.core.tables import Classifier
from service.deps import Parts, PartsDep
from service.json import FastJSON
from service.openapi import body_schema
from service.problems import documented, invalid
from service.schemas import ClassifyOut, HuggingFaceRequest
from service.uploads import content_type_of, file_fields, filename_of, multipart

router = APIRouter(prefix="/v1/classify", tags=["classify"])
Scope = Literal["unseen", "seen", "all"]


class Options(BaseModel):
    """What a classify request may say beside its images."""

    model_config = ConfigDict(extra="forbid")
    classifier_id: str | None = Field(None, max_length=40)
    scope: Scope = "all"
    class_names: list[str] | None = None
    top_k: int = Field(5, ge=1, le=100_000)
    gamma: float | None = Field(None, allow_inf_nan=False)
    explain: bool = False


@router.post(
    "",
    response_model=ClassifyOut,
    responses=documented(NotFound, Conflict, TooLarge, UnsupportedMedia),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["images"],
                        "properties": {
                            "images": {"type": "array", "items": {"type": "string", "format": "binary"}},
                            **Options.model_json_schema()["properties"],
                        },
                    }
                },
                "image/*": {"schema": {"type": "string", "format": "binary"}},
                "application/json": {"schema": body_schema(HuggingFaceRequest)},
            },
        }
    },
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
) -> Response:
    """Recognises seen and unseen classes. Options go in the query, or, with multipart, in the form."""
    given = {
        "classifier_id": classifier_id,
        "scope": scope,
        "class_names": class_names,
        "top_k": top_k,
        "gamma": gamma,
        "explain": explain,
    }
    given = {name: value for name, value in given.items() if value is not None}
    content_type = content_type_of(request)
    if content_type == "multipart/form-data":
        return await _classify_multipart(request, parts, given)
    if content_type.startswith("image/") or content_type == "application/octet-stream":
        data = await request.body()
        if not data:
            raise Invalid("The body is empty; send the bytes of one image.")
        return FastJSON(await run(parts, _options(given), [data], [None]))
    if content_type == "application/json":
        return await _classify_hugging_face(await request.body(), parts, given)
    raise UnsupportedMedia(
        "Send multipart/form-data with 'images', one image as image/*, or JSON {inputs, parameters}; "
        f"not {content_type or 'a body without Content-Type'!r}."
    )


async def _classify_multipart(request: Request, parts: Parts, given: dict[str, Any]) -> Response:
    async with multipart(request, parts.settings) as form:
        files = file_fields(form, "images", "images[]", "image", "files", "file")
        for name in Options.model_fields:
            values = [v for v in (*form.getlist(name), *form.getlist(f"{name}[]")) if isinstance(v, str)]
            if values:
                given[name] = _list_field(values) if name == "class_names" else values[-1]
        options = _options(given)
        if not files:
            raise Invalid("The form holds no images; send them in the field 'images'.")
        if len(files) > parts.settings.max_classify_images:
            raise TooLarge(
                f"{len(files)} images; one request takes at most {parts.settings.max_classify_images}. Send several."
            )
        images = [await file.read() for file in files]
        names = [filename_of(file) for file in files]
    return FastJSON(await run(parts, options, images, names))


def _list_field(values: Sequence[str]) -> list[str]:
    """A list in a form: a JSON array, a repeated field, or names separated by commas."""
    if len(values) == 1 and values[0].lstrip().startswith("["):
        try:
            names = orjson.loads(values[0])
        except orjson.JSONDecodeError as error:
            raise Invalid(f"'class_names' is no valid JSON list: {error}.") from None
        return [str(name) for name in names]
    return [part.strip() for value in values for part in value.split(",")] if len(values) == 1 else list(values)


async def _classify_hugging_face(raw: bytes, parts: Parts, given: dict[str, Any]) -> Response:
    try:
        body = HuggingFaceRequest.model_validate_json(raw)
        image = base64.b64decode(body.inputs.partition("base64,")[2] or body.inputs, validate=True)
    except ValidationError as error:
        raise invalid(error.errors(), HuggingFaceRequest) from None
    except binascii.Error:
        raise Invalid("`inputs` must be the image in base64.", problems=[Problem("/inputs", "not base64")]) from None
    labels = body.parameters.candidate_labels
    given |= {"class_names": labels, "top_k": body.parameters.top_k or len(labels)}
    if body.classifier_id:
        given["classifier_id"] = body.classifier_id
    result = (await run(parts, _options(given), [image], [None]))["data"][0]
    if result["error"]:
        raise Invalid(result["error"], problems=[Problem("/inputs", result["error"])])
    return FastJSON([{"label": p["label"], "score": p["score"]} for p in result["predictions"]])


def _options(given: dict[str, Any]) -> Options:
    try:
        options = Options.model_validate(given)
    except ValidationError as error:
        raise invalid(error.errors(), Options) from None
    if options.class_names is None:
        return options
    if not options.class_names:
        raise Invalid("`class_names` is empty; leave it out to let all classes of the scope compete.")
    names = validate_class_names(options.class_names, field="class_names")
    return options.model_copy(update={"class_names": list(names)})


async def run(
    parts: Parts, options: Options, images: Sequence[bytes], filenames: Sequence[str | None]
) -> dict[str, Any]:
    """Asks the inference process and shapes its answer."""
    classifier_id = await run_in_threadpool(ready_classifier_id, parts, options.classifier_id)
    asked = options.model_dump(exclude={"classifier_id"}) | {"classifier_id": classifier_id}
    limit = parts.settings.max_image_bytes
    too_large = [len(image) > limit for image in images]
    sent = [b"" if refused else image for image, refused in zip(images, too_large, strict=True)]
    answer = await parts.inference.classify(asked, sent)
    data = [
        {"index": index, "filename": name, "error": None, "explanation": None, **result}
        for index, (name, result) in enumerate(zip(filenames, answer["results"], strict=True))
    ]
    for item, image, refused in zip(data, images, too_large, strict=True):
        if refused:
            item["error"] = f"The file has {len(image):,} bytes; at most {limit:,} are taken."
    return {"classifier_id": classifier_id, "scope": options.scope, "gamma": answer["gamma"], "data": data}


def ready_classifier_id(parts: Parts, classifier_id: str | None) -> str:
    """The classifier asked for, or the newest; Conflict when it is not ready."""
    with parts.database.read() as session:
        if classifier_id is None:
            newest = repositories.latest_classifier(session)
            if newest is None:
                raise NotFound("There is no ready classifier yet; train one with POST /v1/classifiers.")
            return newest.id
        row = repositories.get(session, Classifier, classifier_id)
    if row.status != "ready":
        raise Conflict(f"Classifier {row.id!r} is {row.status}; see job {row.job_id}.", retry_after_s=2)
    return row.id
