"""Opens what jobs and the inference process compute with: knowledge sources, backbones, saved models."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from models.catalog import get_method
from models.errors import InvalidInput
from models.knowledge.base import KnowledgeSource
from models.knowledge.tables import ClassTable
from models.knowledge.text_encoder import SAME_LOAD, TextEncoder
from models.knowledge.word_vectors import WordVectorIndex
from models.params import BackboneParams
from service.core.artifacts import ArtifactStore
from service.core.errors import Conflict, Unavailable
from service.core.settings import Settings
from service.core.tables import Knowledge
from workers.runtime import choose_device

if TYPE_CHECKING:
    from models.backbones import Backbone, FeatureNetwork
    from models.backends.base import Place


def unpack(store: ArtifactStore, artifacts: Mapping[str, str], names: tuple[str, ...], directory: Path) -> Path:
    """A directory holding the named files of an artifact set, linked from the store where it is local."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        source, target = store.local_path(artifacts[name]), directory / name
        if not target.exists():
            aside = Path(tempfile.mktemp(dir=directory))
            try:
                os.link(source, aside)
            except OSError:  # another file system
                shutil.copyfile(source, aside)
            aside.replace(target)
    return directory


def open_knowledge(row: Knowledge, store: ArtifactStore, settings: Settings) -> KnowledgeSource:
    """The knowledge source behind a ready row; its files are laid out once in the cache directory."""
    if row.kind == "text_encoder":
        return _same_text_encoder(row, settings)
    names = tuple(row.artifacts)
    digest = hashlib.sha256("".join(f"{n}={row.artifacts[n]}\n" for n in sorted(names)).encode()).hexdigest()[:32]
    directory = unpack(store, row.artifacts, names, settings.cache_dir / "knowledge" / digest)
    return WordVectorIndex.open(directory) if row.kind == "word_vectors" else ClassTable.load(directory)


def open_text_encoder(model: str, template: str, settings: Settings) -> TextEncoder:
    """A sentence-transformers model by hub name, or a folder of the weights directory by its plain name."""
    device = choose_device(settings.device)
    if settings.weights_dir is not None and (local := settings.weights_dir / model).is_dir() and "/" not in model:
        return TextEncoder(model, template, folder=local, device=device)
    return TextEncoder(model, template, device=device)


def describe_text_encoder(model: str, template: str, settings: Settings) -> tuple[int, dict[str, Any]]:
    """Length of its vectors, and what a row says of it; InvalidInput for a model that lacks weights.

    The library fills in what is missing with random numbers, other ones at every load.
    """
    encoder = open_text_encoder(model, template, settings)
    dim, fingerprint = encoder.dim, encoder.fingerprint()
    del encoder  # two large models might not fit
    if not open_text_encoder(model, template, settings).has_fingerprint(fingerprint, within=SAME_LOAD):
        raise InvalidInput(
            f"The text encoder {model!r} answers differently each time it is loaded: weights that its config.json "
            "asks for are missing. Save it anew, or download it again.",
            field="model",
        )
    return dim, {"model": model, "template": template, "fingerprint": fingerprint}


def _same_text_encoder(row: Knowledge, settings: Settings) -> TextEncoder:
    """The encoder behind a row. Another one in its place would give vectors that do not go with the earlier ones."""
    encoder = open_text_encoder(row.summary["model"], row.summary["template"], settings)
    expected = row.summary.get("fingerprint")  # older rows lack it
    if expected is not None and not encoder.has_fingerprint(expected):
        raise Conflict(
            f"The text encoder {encoder.model!r} has changed since knowledge {row.id!r} was made: it gives other "
            "vectors now. Put the earlier one back, or add this one as new knowledge."
        )
    return encoder


def open_backbone(params: BackboneParams, settings: Settings, *, device: str, weights: Path | None = None) -> Backbone:
    """The network of a request. `weights`: the file to use in place of what `params.weights` names (trained ones)."""
    from models.backbones import create_backbone

    if weights is None:
        weights = _weights_path(params, settings)
    return create_backbone(params.name, weights=weights, precision=params.precision, device=device)


def feature_network(backbone: Backbone, method: str, size: int, params: Mapping[str, Any]) -> FeatureNetwork:
    """What makes the features that a classifier's method sees, of images of `size` pixels a side.

    params: the classifier's. Where it trains the network's last layers, it sees what enters these.
    """
    from models.backbone_parts import Trunk
    from models.backbones import SpatialBackbone

    if get_method(method, "classifier").features == "pooled":
        return backbone
    if params.get("mode") == "finetune":
        return Trunk(backbone, size, params["finetuned_share"])
    return SpatialBackbone(backbone, size)


def fast_backbone(
    backbone: FeatureNetwork, size: int, settings: Settings, *, streams: int = 1, may_prepare: bool = True
) -> FeatureNetwork:
    """What computes the same features of images of `size` pixels a side sooner, where there is something.

    streams: batches that run at a time. may_prepare: whether it is worth seconds of preparation. Views of a network,
    such as its maps, stay as they are.
    """
    from models.backbones import Backbone
    from models.backends.choice import fast_network

    if not isinstance(backbone, Backbone):
        return backbone
    return fast_network(backbone, _place(size, settings, streams), backend=settings.backend, may_prepare=may_prepare)


def may_become_faster(backbone: FeatureNetwork, size: int, settings: Settings) -> bool:
    """Whether `fast_backbone` may give more where it may prepare the network, which takes seconds."""
    from models.backbones import Backbone
    from models.backends.choice import awaits_preparation

    return isinstance(backbone, Backbone) and awaits_preparation(
        backbone, _place(size, settings), backend=settings.backend
    )


def _place(size: int, settings: Settings, streams: int = 1) -> Place:
    from models.backends.base import Place

    directory = settings.cache_dir / "networks"
    if settings.threads:
        return Place(size, directory, settings.threads, streams)
    return Place(size, directory, streams=streams)


def _weights_path(params: BackboneParams, settings: Settings) -> Path | None:
    if params.weights == "random":
        return None
    if params.weights == "imagenet":
        return fetch_weights(params.name, settings)
    if settings.weights_dir is None:
        raise InvalidInput(
            f"The weights {params.weights!r} were asked for, but this worker has no UNSEEN_WEIGHTS_DIR.",
            field="params/backbone/weights",
        )
    path = settings.weights_dir / Path(params.weights).name
    if not path.is_file():
        raise InvalidInput(
            f"There is no file {params.weights!r} in the worker's weights directory.", field="params/backbone/weights"
        )
    return path


def fetch_weights(name: str, settings: Settings) -> Path:
    """torchvision's default weights of a network, downloaded once and checked against the digest in their name."""
    from models.backbones import torchvision_weights

    wanted = torchvision_weights(name)
    directory = settings.cache_dir / "weights"
    path = directory / wanted.file_name
    if path.is_file():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=directory, prefix=".download-")
    digest = hashlib.sha256()
    try:
        with os.fdopen(descriptor, "wb") as target, httpx.stream("GET", wanted.url, follow_redirects=True) as answer:
            answer.raise_for_status()
            for chunk in answer.iter_bytes(2**20):
                digest.update(chunk)
                target.write(chunk)
        if not digest.hexdigest().startswith(wanted.sha256_prefix):
            raise InvalidInput(f"The weights of {name!r} arrived damaged: their SHA-256 does not match. Try again.")
        os.replace(aside, path)
    except httpx.HTTPError as error:
        raise Unavailable(
            f"The weights of {name!r} could not be downloaded from {wanted.url} ({type(error).__name__}). "
            f"Put the file into the worker's UNSEEN_WEIGHTS_DIR ({settings.weights_dir or 'not set'}) and name it in "
            "params.backbone.weights."
        ) from error
    finally:
        Path(aside).unlink(missing_ok=True)
    return path


def describe_backbone(params: BackboneParams, backbone: Backbone) -> dict[str, Any]:
    """What a result says about the network that made its features."""
    return {**params.model_dump(mode="json"), "digest": backbone.digest, "feature_dim": backbone.feature_dim}
