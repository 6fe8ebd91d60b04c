"""Patch clusterings on disk: `heads.safetensors`, `clustering.json`, and `backbone.safetensors` after fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.base import FloatArray
from models.embedding.heads import ClusterHeads
from models.errors import InvalidInput
from models.params import ClusteringParams

FORMAT = 1
HEADS_FILE = "heads.safetensors"
BACKBONE_FILE = "backbone.safetensors"
MANIFEST_FILE = "clustering.json"


def save_heads(
    directory: Path,
    heads: ClusterHeads,
    class_embeddings: FloatArray,
    backbone: dict[str, Tensor] | None,
    about: dict[str, Any],
) -> None:
    """Writes a fitted model; the manifest, `about`, goes last, so a directory that has one is complete.

    class_embeddings: (C, E). about: JSON, with the clustering's `params`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in heads.state_dict().items()}
    save_file({**tensors, "class_embeddings": torch.from_numpy(class_embeddings)}, directory / HEADS_FILE)
    if backbone is not None:
        weights = {name: tensor.contiguous().clone() for name, tensor in backbone.items()}
        save_file(weights, directory / BACKBONE_FILE)
    manifest = {"format": FORMAT, "method": "vgse", **about}
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def load_heads(directory: Path) -> tuple[ClusterHeads, FloatArray, dict[str, Tensor] | None, dict[str, Any]]:
    """What `save_heads` was given; InvalidInput if the directory holds nothing of it, or another format."""
    about = _read_manifest(directory / MANIFEST_FILE)
    params = ClusteringParams(**about["params"])
    tensors = load_file(directory / HEADS_FILE)
    class_embeddings = tensors.pop("class_embeddings").numpy()
    heads = ClusterHeads(
        tensors["centre"],
        tensors["scale"],
        n_clusters=len(tensors["clusters.weight"]),
        n_classes=len(tensors["classes.weight"]),
        knowledge_dim=len(tensors["knowledge.weight"]),
        head_input=params.head_input,
    )
    heads.load_state_dict(tensors)
    weights = directory / BACKBONE_FILE
    backbone = load_file(weights) if params.mode == "finetune" and weights.is_file() else None
    return heads.eval(), class_embeddings, backbone, about


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InvalidInput(f"{path.parent.name!r} holds no saved patch clustering: {path.name} is missing.")
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT or manifest.get("method") != "vgse":
        raise InvalidInput(f"{path.name} is not a patch clustering of format {FORMAT}.")
    return manifest
