"""Request and response bodies of the REST API (v1). No torch; unknown fields are refused."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from models.params import BackboneParams, EmbeddingSetParams, ScratchParams, SearchParams
from service.json import storable_json

Item = TypeVar("Item")
Name = Annotated[
    str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f][^\x00-\x1f\x7f]*$")
]
Id = Annotated[str, Field(min_length=1, max_length=40, pattern=r"^[^\x00-\x1f]*$")]
Encoding = Literal["float", "base64"]

Metadata = Annotated[dict[str, Any], AfterValidator(storable_json)]


class Body(BaseModel):
    """Base of request bodies."""

    model_config = ConfigDict(extra="forbid")


class Page(BaseModel, Generic[Item]):
    """One page of a list, newest first."""

    data: list[Item]
    has_more: bool
    next_cursor: str | None = Field(description="Pass as `cursor` to get the next page; null on the last.")


# ---- datasets ---------------------------------------------------------------------------------


class DatasetCreate(Body):
    """A new, empty dataset."""

    name: Name
    description: str = Field("", max_length=10_000, pattern=r"^[^\x00]*$")
    metadata: Metadata = Field(default_factory=dict, description="Anything of yours; returned unchanged.")
    test_fraction: float = Field(
        0.2,
        ge=0,
        le=0.9,
        description="Share of each seen class's images that training never sees and evaluation uses, chosen by a "
        "stable hash of their content; images uploaded with an explicit split keep it.",
    )


class DatasetOut(BaseModel):
    """A dataset."""

    id: str
    name: str
    description: str
    metadata: dict[str, Any]
    kind: Literal["images", "features"]
    test_fraction: float
    n_images: int = Field(description="Accepted images, or rows of a features-only dataset.")
    n_classes: int
    summary: dict[str, Any]
    created_at: datetime


class ClassOut(BaseModel):
    """One class of a dataset."""

    class_name: str
    n_images: int
    n_train: int = Field(description="Images fixed as training rows by the uploader.")
    n_test: int = Field(description="Images fixed as test rows by the uploader; the rest follow test_fraction.")


class ImageOut(BaseModel):
    """One accepted image."""

    id: str
    sha256: str
    class_name: str
    filename: str
    width: int
    height: int
    split: Literal["train", "test"] | None
    created_at: datetime
    thumbnail: str = Field(description="Path of a JPEG thumbnail.")


class AcceptedImage(BaseModel):
    """An upload that became (or already was) an image of the dataset."""

    image_id: str
    sha256: str
    class_name: str
    filename: str
    width: int
    height: int
    duplicate: bool = Field(description="True: this content was already in the dataset and was not stored again.")


class RejectedImage(BaseModel):
    """An upload that is no usable image."""

    filename: str
    reason: str


class UploadOut(BaseModel):
    """What became of each uploaded file."""

    accepted: list[AcceptedImage]
    rejected: list[RejectedImage]


# ---- knowledge --------------------------------------------------------------------------------

KnowledgeKind = Literal["word_vectors", "class_vectors", "attributes", "text_encoder"]


class KnowledgeCreate(Body):
    """Knowledge given inline: vectors per class, or the name of a text encoder."""

    name: Name
    kind: KnowledgeKind = "class_vectors"
    vectors: dict[str, list[float]] | None = Field(None, description="class name -> vector; all of one length.")
    attribute_names: list[str] | None = Field(None, description="kind=attributes: a name for each dimension.")
    model: str | None = Field(None, max_length=255, description="kind=text_encoder: a sentence-transformers model.")
    template: str = Field("{}", max_length=500, description="kind=text_encoder: the sentence around a class name.")


class KnowledgeOut(BaseModel):
    """A knowledge source."""

    id: str
    name: str
    kind: KnowledgeKind
    status: Literal["importing", "ready", "failed"]
    dim: int | None
    n_entries: int | None
    summary: dict[str, Any]
    job_id: str | None
    created_at: datetime


class ResolutionOut(BaseModel):
    """How one class name resolved."""

    name: str
    found: bool
    how: str
    tokens: list[str]
    missing_tokens: list[str]
    suggestions: list[str]


class LookupOut(BaseModel):
    """How class names resolve in a knowledge source."""

    knowledge_id: str
    n_found: int
    n_missing: int
    n_partial: int = Field(description="Found, but without some words of the name: see `missing_tokens`.")
    data: list[ResolutionOut]


# ---- embedding sets ---------------------------------------------------------------------------


class EmbeddingSetCreate(Body):
    """Build class embeddings of seen and unseen classes."""

    name: Name | None = Field(None, description="A name to use as `model` in /v1/embeddings; default: the id.")
    dataset_id: Id
    knowledge_id: Id
    seen_classes: list[str] | None = Field(None, description="Default: all classes of the dataset but the unseen ones.")
    unseen_classes: list[str] = Field(default_factory=list, description="Classes without training images.")
    method: str = Field("vgse", max_length=64, description="vgse, kmeans or backbone; see GET /v1/methods.")
    relation: str = Field("auto", max_length=64, description="auto, smo or wavg.")
    params: EmbeddingSetParams = EmbeddingSetParams()


class Estimate(BaseModel):
    """What a request would cost, and everything wrong with it."""

    valid: bool
    problems: list[dict[str, str]]
    warnings: list[dict[str, str]] = Field(description="What makes no request invalid, such as half-known names.")
    n_images: int
    n_patches: int
    seconds: float | None
    memory_bytes: int
    basis: str = Field(description="Where the estimate of seconds comes from.")


class EmbeddingSetOut(BaseModel):
    """An embedding set."""

    id: str
    name: str
    dataset_id: str
    knowledge_id: str
    method: str
    relation: str
    params: dict[str, Any]
    status: Literal["queued", "ready", "failed"]
    dim: int | None
    n_seen: int
    n_unseen: int
    version: int = Field(description="Grows when classes are added live.")
    summary: dict[str, Any] = Field(
        description="Choice of relation with its reason, cluster report, timings, skipped images, warnings."
    )
    job_id: str | None
    created_at: datetime


class NewClasses(Body):
    """Unseen classes to add to an embedding set at once, without retraining."""

    class_names: list[str] = Field(min_length=1, max_length=10_000)
    relation: Literal["smo", "wavg"] | None = Field(None, description="Default: the set's own relation.")


class EmbeddedClass(BaseModel):
    """One class's vector and where it comes from."""

    name: str
    seen: bool
    embedding: list[float] | str = Field(description="Floats, or base64 of little-endian float32.")
    provenance: dict[str, Any] = Field(description="Source; for unseen classes the contributing seen ones.")


class AddedClass(EmbeddedClass):
    """A class asked for, as stored."""

    created: bool = Field(description="False: the set had this class already.")


class AddedClasses(BaseModel):
    """The classes asked for, in that order."""

    data: list[AddedClass]


class EmbeddingsRequest(Body):
    """OpenAI's embeddings request."""

    model: Name = Field(description="Id or name of an embedding set.")
    input: str | list[str] = Field(description="One class name or many.")
    encoding_format: Encoding = "float"
    dimensions: int | None = Field(None, ge=1, description="Keep this many leading dimensions, at unit length again.")
    user: str | None = Field(None, max_length=256, description="Accepted for compatibility; not used.")


class EmbeddingOut(BaseModel):
    """One vector, in OpenAI's shape."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsOut(BaseModel):
    """OpenAI's embeddings answer; usage counts words."""

    object: Literal["list"]
    data: list[EmbeddingOut]
    model: str
    usage: dict[str, int]


# ---- classifiers ------------------------------------------------------------------------------


class ClassifierCreate(Body):
    """Train a zero-shot classifier on a dataset with class embeddings or raw knowledge vectors."""

    name: Name | None = None
    dataset_id: Id
    embedding_set_id: Id | None = Field(None, description="Class embeddings to use; or give knowledge_id.")
    knowledge_id: Id | None = Field(None, description="Use the knowledge source's vectors as they are.")
    seen_classes: list[str] | None = Field(None, description="Default: the embedding set's.")
    unseen_classes: list[str] | None = Field(None, description="Default: the embedding set's.")
    validation_classes: list[str] | None = Field(None, description="Default: the embedding set's, else a seeded fifth.")
    method: str = Field("sje", max_length=64, description="See GET /v1/methods.")
    params: dict[str, Any] = Field(default_factory=dict, description="The method's parameters; see GET /v1/methods.")
    search: SearchParams | None = Field(
        None, description="Look for better parameters on validation classes; those in params stay."
    )
    dimension_names: list[str] | None = Field(
        None,
        min_length=1,
        max_length=65_536,
        description="What the dimensions of the class embeddings are called, such as names people gave to clusters; "
        "default: the attributes' names. Attention maps quote them.",
    )
    dimension_knowledge_id: Id | None = Field(
        None,
        description="For methods that give each dimension a vector (sc_egg): where these vectors start, looked up by "
        "the dimensions' names. Default: what came with the attributes' table, or what clusters answer to where "
        "embeddings hold nothing else, else random ones.",
    )
    backbone: BackboneParams | None = Field(None, description="Default: the embedding set's.")
    scratch: ScratchParams | None = Field(None, description="How a backbone with weights=scratch is trained.")
    image_size: int | None = Field(None, ge=16, le=1024, description="Side images are resized to; default: the set's.")
    evaluate: bool = Field(True, description="Measure T1 and U, S, H on the dataset's test rows.")
    best_on_test: bool = Field(
        False,
        description="Train a second time, through all epochs, and report the best one on test rows beside the results, "
        "as several papers' code does. Nothing is chosen by it.",
    )
    seed: int = Field(0, ge=0, le=2**31 - 1)


class ClassifierEstimate(BaseModel):
    """What training would hold in memory, and everything wrong with the request."""

    valid: bool
    problems: list[dict[str, str]]
    warnings: list[dict[str, str]] = Field(description="What makes no request invalid, such as half-known names.")
    n_images: int = Field(description="Images that training and tests read.")
    memory_bytes: int | None = Field(description="None where the features' size is known in the job only.")
    basis: str = Field(description="Where the estimate comes from.")


class ClassifierOut(BaseModel):
    """A classifier and what was measured."""

    id: str
    name: str
    dataset_id: str
    embedding_set_id: str | None
    knowledge_id: str | None
    method: str
    params: dict[str, Any]
    status: Literal["queued", "ready", "failed"]
    metrics: dict[str, Any] = Field(
        description="zsl.t1; gzsl.u, s, h; seen_t1: T1 of seen test images among seen classes alone; per class; "
        "validation choice; curves; warnings. zsl.confusion and "
        "gzsl.confusion: [i, j, n] where n test images of classes[i] were called classes[j]; lists leave them out."
    )
    job_id: str | None
    created_at: datetime


# ---- jobs, methods, system --------------------------------------------------------------------


class JobOut(BaseModel):
    """A job."""

    id: str
    kind: str
    status: Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
    progress: dict[str, Any] = Field(description="phase, completed, total, fraction, eta_s, metrics, notes.")
    queue_position: int | None
    attempts: int
    max_attempts: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    resource: dict[str, str] = Field(description="kind, id, href of what the job makes or fills; known at once.")
    result: dict[str, Any] | None = Field(description="kind, id, href of what the job made, and its report.")
    error: dict[str, Any] | None = Field(description="A problem object, if it failed.")


class MethodOut(BaseModel):
    """A method of the catalog."""

    name: str
    kind: Literal["embedding", "relation", "classifier"]
    summary: str
    paper: str
    url: str
    features: Literal["pooled", "spatial"] = Field(
        description="What it sees of an image: one vector of the whole, or the network's last map (images only)."
    )
    takes_dimension_vectors: bool = Field(
        description="Whether it starts from a vector of each dimension of the class embeddings: dimension_knowledge_id."
    )
    parameters: dict[str, Any] = Field(description="JSON schema: defaults, bounds, descriptions.")


class Readiness(BaseModel):
    """Whether each part can do its work."""

    ready: bool
    checks: dict[str, str]
