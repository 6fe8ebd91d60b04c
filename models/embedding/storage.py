"""Patch clusterings on disk: `heads.safetensors`, `clustering.json`, and `backbone.safetensors` after fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from models.embedding.heads import ClusterHeads
from models.embedding.report import ClusterReport
from models.errors import InvalidInput
from models.params import ClusteringParams

if TYPE_CHECKING:
    from models.embedding.clustering import PatchClustering

FORMAT = 1
HEADS_FILE = "heads.safetensors"
BACKBONE_FILE = "backbone.safetensors"
MANIFEST_FILE = "clustering.json"


def save_heads(model: PatchClustering, directory: Path) -> None:
    """Writes a fitted model; the manifest goes last, so a directory that has one is complete."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.heads_.state_dict().items()}
    save_file({**tensors, "class_embeddings": torch.from_numpy(model.class_embeddings_)}, directory / HEADS_FILE)
    if model.backbone_ is not None:
        weights = {name: tensor.contiguous().clone() for name, tensor in model.backbone_.items()}
        save_file(weights, directory / BACKBONE_FILE)
    manifest = {
        "format": FORMAT,
        "method": "vgse",
        "params": model.params.model_dump(),
        "seed": model.seed,
        "class_names": list(model.class_names_),
        "best_epoch": model.best_epoch_,
        "history": model.history_,
        "report": model.report_.to_json(),
    }
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def load_heads(kind: type[PatchClustering], directory: Path, device: str) -> PatchClustering:
    """The model that `save_heads` wrote; InvalidInput if the directory holds none or one of another format."""
    manifest = _read_manifest(directory / MANIFEST_FILE)
    tensors = load_file(directory / HEADS_FILE)
    model = kind(ClusteringParams(**manifest["params"]), seed=manifest["seed"], device=device)
    model.class_embeddings_ = tensors.pop("class_embeddings").numpy()
    model.class_names_ = tuple(manifest["class_names"])
    model.best_epoch_ = manifest["best_epoch"]
    model.history_ = manifest["history"]
    model.report_ = ClusterReport.from_json(manifest["report"])
    weights = directory / BACKBONE_FILE
    model.backbone_ = load_file(weights) if model.params.mode == "finetune" and weights.is_file() else None
    heads = ClusterHeads(
        tensors["centre"],
        tensors["scale"],
        n_clusters=len(tensors["clusters.weight"]),
        n_classes=len(tensors["classes.weight"]),
        knowledge_dim=len(tensors["knowledge.weight"]),
        head_input=model.params.head_input,
    )
    heads.load_state_dict(tensors)
    model.heads_ = heads.to(device).eval()
    return model


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InvalidInput(f"{path.parent.name!r} holds no saved patch clustering: {path.name} is missing.")
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT or manifest.get("method") != "vgse":
        raise InvalidInput(f"{path.name} is not a patch clustering of format {FORMAT}.")
    return manifest
