"""Requests that bring images and options: a multipart form, or one raw image with its options in the query."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import InvalidInput, nearest_names
from service.core import repositories
from service.core.disconnect import unless_gone
from service.core.errors import Conflict, Invalid, Problem, TooLarge, UnsupportedMedia
from service.core.repositories import ClassifierState
from service.deps import Parts
from service.problems import invalid, pointer_of
from service.uploads import content_type_of, file_fields, filename_of, multipart

Send = Callable[[dict[str, Any], Sequence[bytes]], Awaitable[dict[str, Any]]]
MAX_TIMEOUT_S = 600.0
LISTS = ("class_names",)
"""Options that are lists."""


class ImageOptions(BaseModel):
    """What every request with images may say beside them, in the query or, with multipart, in the form."""

    model_config = ConfigDict(extra="forbid")
    timeout_s: float | None = Field(
        None, gt=0, le=MAX_TIMEOUT_S, description="Seconds within which the answer is of use, else 504."
    )


Options = TypeVar("Options", bound=ImageOptions)


@dataclass(frozen=True)
class ImageRequest:
    """Images with the file names they came under, and the options that came with them, unchecked.

    places: the steps to options that stand elsewhere than in a field of the body of the same name.
    """

    images: list[bytes]
    filenames: list[str | None]
    options: dict[str, Any]
    places: dict[str, tuple[str, ...]]

    @contextmanager
    def pointing(self, **called: str) -> Iterator[None]:
        """Errors about options point to where these stand. called: options that errors call by another name."""
        try:
            yield
        except Invalid as error:
            error.problems = [Problem(self._placed(p.pointer, called), p.message) for p in error.problems]
            raise
        except InvalidInput as error:
            error.field = error.field and self._placed("/" + error.field, called)[1:]
            raise

    def _placed(self, pointer: str, called: dict[str, str]) -> str:
        name, *more = pointer[1:].split("/")
        name = called.get(name, name)
        return pointer_of([*self.place(name), *(more if name in LISTS else ())]) if name in self.options else pointer

    def place(self, name: str) -> tuple[str, ...]:
        """The steps to an option."""
        return self.places.get(name, (name,))


def image_operation(options: type[ImageOptions], json: dict[str, Any] | None = None) -> dict[str, Any]:
    """What OpenAPI says of a request with images and `options`; `json`: the schema of a body that is an object."""
    binary = {"type": "string", "format": "binary"}
    fields = options.model_json_schema()["properties"]
    schemas = {
        "multipart/form-data": {
            "type": "object",
            "required": ["images"],
            "properties": {"images": {"type": "array", "items": binary}, **fields},
        },
        "image/*": binary,
    }
    if json is not None:
        schemas["application/json"] = json
    parameters = []
    for name, field in fields.items():
        schema = dict(field)
        described = {"description": schema.pop("description")} if "description" in field else {}
        parameters.append({"name": name, "in": "query", "required": False, **described, "schema": schema})
    content = {media_type: {"schema": schema} for media_type, schema in schemas.items()}
    return {"parameters": parameters, "requestBody": {"required": True, "content": content}}


def in_query(request: Request, options: type[ImageOptions]) -> dict[str, Any]:
    """The `options` that the query states, unchecked. Invalid for names that are none."""
    query = request.query_params
    _require_known(query.keys(), options, "/query")
    return {name: query.getlist(name) if name in LISTS else query[name] for name in query}


def in_the_query(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The places of options there."""
    return {name: ("query", name) for name in names}


def _require_known(names: Iterable[str], options: type[ImageOptions], where: str) -> None:
    known = list(options.model_fields)
    for name in names:
        if name not in known:
            near = nearest_names(name, known)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise Invalid(
                f"There is no option {name!r}.{hint} Options are {', '.join(known)}.",
                problems=[Problem(f"{where}/{name}", "unknown option")],
            )


def validated(request: ImageRequest, kind: type[Options]) -> Options:
    """The options as a `kind`; Invalid with all that is wrong with them."""
    try:
        return kind.model_validate(request.options)
    except ValidationError as error:
        errors = [{**e, "loc": (*request.place(str(e["loc"][0])), *e["loc"][1:])} for e in error.errors()]
        raise invalid(errors, kind) from None


async def read_images(
    request: Request, parts: Parts, given: dict[str, Any], options: type[ImageOptions]
) -> ImageRequest:
    """The request's images; `options` of the form go before those `given` in the query."""
    content_type = content_type_of(request)
    if content_type == "multipart/form-data":
        return await _read_form(request, parts, given, options)
    if content_type.startswith("image/") or content_type == "application/octet-stream":
        data = await request.body()
        if not data:
            raise Invalid("The body is empty; send the bytes of one image.")
        return ImageRequest([data], [None], given, in_the_query(given))
    raise UnsupportedMedia(
        "Send multipart/form-data with 'images', one image as image/*, or, where JSON is taken, {inputs, parameters}; "
        f"not {content_type or 'a body without Content-Type'!r}."
    )


async def _read_form(
    request: Request, parts: Parts, given: dict[str, Any], options: type[ImageOptions]
) -> ImageRequest:
    stated = dict(given)
    async with multipart(request, parts.settings) as form:
        files = file_fields(form, "images", "images[]", "image", "files", "file")
        texts: dict[str, list[str]] = {}
        for name, value in form.multi_items():
            if isinstance(value, str):
                texts.setdefault(name.removesuffix("[]"), []).append(value)
        _require_known(texts, options, "")
        for name, values in texts.items():
            stated[name] = _list_field(values) if name in LISTS else values[-1]
        if not files:
            raise Invalid("The form holds no images; send them in the field 'images'.")
        if len(files) > parts.settings.max_classify_images:
            raise TooLarge(
                f"{len(files)} images; one request takes at most {parts.settings.max_classify_images}. Send several."
            )
        places = in_the_query(given.keys() - texts.keys())
        return ImageRequest(
            [await file.read() for file in files], [filename_of(file) for file in files], stated, places
        )


async def ask(
    request: Request, parts: Parts, send: Send, asked: dict[str, Any], images: ImageRequest
) -> tuple[dict[str, Any], list[Any]]:
    """What the inference process answers, and its results in the order of the images; those too large are not sent.

    The work is dropped when the caller hangs up.
    """
    limit = parts.settings.max_image_bytes
    too_large = [len(image) > limit for image in images.images]
    sent = [b"" if refused else image for image, refused in zip(images.images, too_large, strict=True)]
    asked = {**asked, "timeout_s": asked.get("timeout_s") or parts.settings.inference_timeout_s}
    answer = await unless_gone(request.receive, send(asked, sent))
    data = [
        {"index": index, "filename": name, "error": None, **result}
        for index, (name, result) in enumerate(zip(images.filenames, answer["results"], strict=True))
    ]
    for item, image, refused in zip(data, images.images, too_large, strict=True):
        if refused:
            item["error"] = f"The file has {len(image):,} bytes; at most {limit:,} are taken."
    return answer, data


def _list_field(values: Sequence[str]) -> list[str]:
    """A list in a form: a JSON array, a repeated field, or names separated by commas."""
    if len(values) == 1 and values[0].lstrip().startswith("["):
        try:
            names = orjson.loads(values[0])
        except orjson.JSONDecodeError as error:
            raise Invalid(f"'class_names' is no valid JSON list: {error}.") from None
        return [str(name) for name in names]
    return [part.strip() for value in values for part in value.split(",")] if len(values) == 1 else list(values)


async def ready_classifier(parts: Parts, classifier_id: str | None, method: str | None = None) -> ClassifierState:
    """The classifier asked for, or the newest, of `method` if one is given; Conflict when it is not ready."""
    found = await repositories.classifier_now(parts.database, classifier_id, method)
    if found.status != "ready":
        raise Conflict(f"Classifier {found.id!r} is {found.status}; see job {found.job_id}.", retry_after_s=2)
    return found
