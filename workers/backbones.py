"""The backbone of a job: pretrained, or trained from scratch on the seen classes and kept for later jobs."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from models.base import Progress
from models.data.images import ImageLimits, decode_image
from models.errors import InvalidInput, TooFewSamples, UnreadableImage
from models.params import BackboneParams, PatchParams, ScratchParams
from service.core import caches
from service.core.artifacts import image_key
from workers.runner import TaskContext
from workers.sources import open_backbone

if TYPE_CHECKING:
    from models.backbones import Backbone

TRAINING_SIDE = 96  # pixels; the small network's own input size
MAX_TRAINING_BYTES = 4 * 2**30  # of decoded images held in memory: 150,000 at 96 pixels
BACKBONE_FILE = "backbone.safetensors"


def prepared_backbone(
    context: TaskContext,
    params: BackboneParams,
    scratch: ScratchParams,
    sha256s: Sequence[str],
    labels: np.ndarray[Any, Any],
    *,
    seed: int,
    device: str,
) -> tuple[Backbone, dict[str, str]]:
    """The network, and the artifacts that bring it back (empty where its weights have a name of their own)."""
    context.progress(Progress("backbone", 0, 1))
    if params.weights != "scratch":
        backbone = open_backbone(params, context.settings, device=device)
        context.progress(Progress("backbone", 1, 1))
        return backbone, {}
    key = _cache_key(params, scratch, sha256s, labels, seed)
    with context.database.read() as session:
        cached = caches.artifact(session, key)
    if cached is not None and context.store.exists(cached.artifact):
        artifact = cached.artifact
    else:
        artifact = _train(context, params, scratch, sha256s, labels, key, seed, device)
    weights = context.scratch_dir / BACKBONE_FILE
    if not weights.exists():
        weights.symlink_to(context.store.local_path(artifact))
    return open_backbone(params, context.settings, device=device, weights=weights), {BACKBONE_FILE: artifact}


def _cache_key(
    params: BackboneParams, scratch: ScratchParams, sha256s: Sequence[str], labels: np.ndarray[Any, Any], seed: int
) -> str:
    """Digest of all that determines the trained weights."""
    digest = hashlib.sha256(json.dumps([params.name, scratch.model_dump(), seed, TRAINING_SIDE]).encode())
    for sha256, label in zip(sha256s, labels.tolist(), strict=True):
        digest.update(f"{sha256} {label}\n".encode())
    return f"backbone-{digest.hexdigest()}"


def _train(
    context: TaskContext,
    params: BackboneParams,
    scratch: ScratchParams,
    sha256s: Sequence[str],
    labels: np.ndarray[Any, Any],
    key: str,
    seed: int,
    device: str,
) -> str:
    from models.small_cnn import train_small_cnn
    from models.weights import save_state

    images, usable = _decoded(context, sha256s)
    started = time.perf_counter()
    model = train_small_cnn(images, labels[usable], scratch, seed=seed, device=device, on_progress=context.progress)
    images_per_s = scratch.epochs * len(usable) / (time.perf_counter() - started)
    path = context.scratch_dir / "trained.safetensors"
    save_state(model, path)
    artifact = context.store.put_file(path)
    summary = {"name": params.name, "n_images": len(usable), "images_per_s": round(images_per_s, 1)}
    with context.database.write() as session:
        caches.put_artifact(session, key, artifact, summary)
    return artifact


def _decoded(context: TaskContext, sha256s: Sequence[str]) -> tuple[np.ndarray[Any, Any], list[int]]:
    """(n, 3, side, side) uint8 of the images that can be read, and which they are."""
    from models.embedding.patches import cut_patches, patch_boxes

    settings = context.settings
    limits = ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels)
    at_most = MAX_TRAINING_BYTES // (3 * TRAINING_SIDE**2)
    if len(sha256s) > at_most:
        raise InvalidInput(
            f"Training from scratch takes at most {at_most:,} images; the seen classes have {len(sha256s):,}. "
            "Use pretrained weights.",
            field="params/backbone/weights",
        )
    whole = PatchParams(method="whole", n_patches=1, size=TRAINING_SIDE)
    decoded, usable = [], []
    for position, sha256 in enumerate(sha256s):
        try:
            image = decode_image(context.store.read_bytes(image_key(sha256)), limits, target_side=TRAINING_SIDE)
        except UnreadableImage:
            continue  # reported when its features are asked for
        decoded.append(cut_patches(image, patch_boxes(image, whole), TRAINING_SIDE)[0].numpy())
        usable.append(position)
        context.progress.check()
    if not decoded:
        raise TooFewSamples("None of the training images could be read.", field="seen_classes")
    return np.stack(decoded), usable
