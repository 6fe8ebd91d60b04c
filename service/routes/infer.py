"""POST /v1/infer: what an image is like whose class nobody has described."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from models.knowledge.names import validate_class_names
from service.answers import InferOut
from service.core import repositories
from service.core.errors import Conflict, Invalid, NotFound, TooLarge, UnsupportedMedia
from service.core.tables import Classifier
from service.deps import Parts, PartsDep
from service.image_requests import ask, image_body, read_images, ready_classifier_id, stated, validated
from service.json import FastJSON
from service.problems import documented

router = APIRouter(prefix="/v1/infer", tags=["classify"])
METHOD = "psr"


class Options(BaseModel):
    """What an infer request may say beside its images."""

    model_config = ConfigDict(extra="forbid")
    classifier_id: str | None = Field(None, max_length=40)
    class_names: list[str] | None = Field(None, min_length=1)
    tau: float = Field(0.0, ge=-1, le=1)
    top_k: int = Field(10, ge=1, le=100_000)


@router.post(
    "",
    response_model=InferOut,
    responses=documented(NotFound, Conflict, TooLarge, UnsupportedMedia),
    openapi_extra=image_body(Options),
)
async def infer(
    request: Request,
    parts: PartsDep,
    classifier_id: Annotated[str | None, Query(max_length=40, description="Default: the newest ready PSR one.")] = None,
    class_names: Annotated[list[str] | None, Query(description="Compare with these only; default all.")] = None,
    tau: Annotated[float | None, Query(ge=-1, le=1, description="Classes of at least this cosine are similar.")] = None,
    top_k: Annotated[int | None, Query(ge=1, le=100_000, description="Of each side, at most.")] = None,
) -> Response:
    """Approximate semantic inference (PSR, 4.5): the known classes that images of unknown ones are like, and unlike."""
    given = stated(classifier_id=classifier_id, class_names=class_names, tau=tau, top_k=top_k)
    images = await read_images(request, parts, given, Options.model_fields)
    options = validated(images.options, Options)
    names = options.class_names and list(validate_class_names(options.class_names, field="class_names"))
    chosen = await run_in_threadpool(_classifier_id, parts, options.classifier_id)
    asked = {"classifier_id": chosen, "class_names": names, "tau": options.tau, "top_k": options.top_k}
    _, data = await ask(parts, parts.inference.infer, asked, images)
    return FastJSON({"classifier_id": chosen, "tau": options.tau, "data": data})


def _classifier_id(parts: Parts, classifier_id: str | None) -> str:
    """The PSR classifier asked for, or the newest ready one; others have no cosines to compare."""
    if classifier_id is None:
        with parts.database.read() as session:
            newest = repositories.latest_classifier(session, method=METHOD)
        if newest is None:
            raise NotFound(f"There is no ready classifier of method {METHOD!r}; train one with POST /v1/classifiers.")
        return newest.id
    chosen = ready_classifier_id(parts, classifier_id)
    with parts.database.read() as session:
        method = repositories.get(session, Classifier, chosen).method
    if method != METHOD:
        raise Invalid(
            f"Classifier {chosen!r} is of method {method!r}; /v1/infer takes {METHOD!r}, whose scores are cosines."
        )
    return chosen
