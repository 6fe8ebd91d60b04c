"""VGSE patch clustering: visual properties as clusters of patches, and seen-class embeddings from them (Eq. 1-8).

Xu, Xian, Wang, Schiele, Akata: VGSE: Visually-Grounded Semantic Embeddings for Zero-Shot Learning, CVPR 2022,
https://arxiv.org/abs/2203.10444. What the paper leaves open (loss weights, schedule, neighbours) is in
`ClusteringParams`; the number of epochs is chosen on validation classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.base import FloatArray, IntArray, LabelledFeatures, OnProgress, PatchTable, Progress, ignore_progress
from models.device_memory import with_smaller_batches
from models.embedding.checks import check_table, class_numbers, patch_classes
from models.embedding.epoch_choice import ValidationScorer, best_epoch, unit_knowledge
from models.embedding.finetune import BackboneRows, TrainableBackbone
from models.embedding.heads import ClusterHeads, seeded_heads
from models.embedding.neighbours import NeighbourLists, nearest_neighbours
from models.embedding.report import ClusterReport, cluster_report
from models.embedding.rows import CachedRows, FeatureRows, blocks, feature_statistics
from models.embedding.storage import load_heads, save_heads
from models.embedding.training import PatchSet, class_means, train_epoch
from models.errors import InvalidInput, NotFitted, TooFewSamples
from models.params import ClusteringParams


class PatchClustering:
    """Clusters patches so that neighbours, classes and class knowledge agree; one cluster is one embedding dimension.

    Learned by `fit`: class_embeddings_ (C, E) float32 in the order of `class_names_`; best_epoch_; history_ (one
    dict an epoch: losses, and `validation` where classes were held out; `stage` tells warming up, choosing, fitting);
    report_; heads_; backbone_ (mode 'finetune' only: weights of the trained copy, as its state dict has them).
    """

    class_embeddings_: FloatArray
    class_names_: tuple[str, ...]
    best_epoch_: int
    history_: list[dict[str, Any]]
    report_: ClusterReport
    heads_: ClusterHeads
    backbone_: dict[str, Tensor] | None

    def __init__(self, params: ClusteringParams, *, seed: int = 0, device: str = "cpu") -> None:
        self.params = params
        self.seed = seed
        self.device = device

    def fit(
        self,
        patches: PatchTable,
        class_knowledge: FloatArray,
        *,
        image_features: LabelledFeatures | None = None,
        validation_classes: Sequence[str] = (),
        backbone: TrainableBackbone | None = None,
        on_progress: OnProgress = ignore_progress,
    ) -> PatchClustering:
        """Learns from the patches of seen classes.

        class_knowledge: (C, Dw), a row for each of `patches.class_names`. image_features: whole-image features of the
        same classes, to score validation classes with; default: the mean of each image's patch features.
        validation_classes: held out to choose the number of epochs; the fit that counts then uses all classes.
        backbone: needed by mode 'finetune', and only there.
        Where batches do not fit the device's memory, it is done with smaller ones: `params` then hold their size, and
        the report says so in its notes.
        Raises TooFewSamples, ShapeMismatch, InvalidInput (NaN), UnknownName (a validation class not in the table),
        OutOfDeviceMemory.
        """
        notes = check_table(patches, class_knowledge, self.params)
        if (self.params.mode == "finetune") != (backbone is not None):
            raise InvalidInput("Mode 'finetune' needs a backbone, and mode 'frozen' takes none.", field="mode")
        centre, spread = feature_statistics(patches.features)
        neighbours = nearest_neighbours(
            patches.features, self.params.n_neighbors, device=self.device, on_progress=on_progress
        )
        task = _Task(patches, unit_knowledge(class_knowledge), neighbours, centre, spread, backbone)
        held_out = class_numbers(patches.class_names, validation_classes)
        about_epoch: list[str] = []

        def train(params: ClusteringParams) -> None:
            self.params = params
            about_epoch[:] = self._fit(task, held_out, image_features, on_progress)

        told = with_smaller_batches(self.params, train, lambda note: on_progress(Progress("clustering", 0, note=note)))
        self.report_ = replace(self.report_, notes=(*notes, *about_epoch, *([told] if told else [])))
        return self

    def _fit(
        self, task: _Task, held_out: IntArray, image_features: LabelledFeatures | None, on_progress: OnProgress
    ) -> list[str]:
        """Choose the epoch, then learn from all classes; returns notes on the choice."""
        notes: list[str] = []
        self.history_ = []
        self.best_epoch_ = self.params.epochs
        on_progress(Progress("clustering", 0, 2 * self.params.epochs))  # starts the clock of the first epoch
        if self.params.early_stopping and len(held_out):
            notes = self._choose_epoch(task, held_out, image_features, on_progress)
        run = _Run(self, task, np.arange(len(task.table.class_names)))
        total = self._n_passes() + self.best_epoch_
        if run.warms_up:
            self.history_.append({"stage": "warm-up", **run.warm_up()})
        for _ in range(self.best_epoch_):
            self._record("fit", run.epoch(), on_progress, total)
        means, usage, winners = class_means(run.heads, run.patches)
        self.class_embeddings_ = means.cpu().numpy()
        self.class_names_ = tuple(task.table.class_names)
        self.report_ = cluster_report(usage.cpu().numpy(), winners.cpu().numpy())
        self.heads_ = run.heads.eval()
        self.backbone_ = None
        if isinstance(run.rows, BackboneRows):
            self.backbone_ = {name: tensor.cpu() for name, tensor in run.rows.module.state_dict().items()}
        return notes

    def assign(self, features: FloatArray) -> FloatArray:
        """(P, D) patch features -> (P, E) soft assignments, rows summing to one (Eq. 1); block by block.

        After fine-tuning, features must come from `backbone_`.
        """
        heads = self._fitted_heads()
        if features.ndim != 2 or features.shape[1] != len(heads.centre):
            raise InvalidInput(
                f"Features have shape {features.shape}, the clusters were learned from (patches, {len(heads.centre)})."
            )
        found = np.empty((len(features), heads.clusters.out_features), dtype=np.float32)
        with torch.inference_mode():
            for block in blocks(len(features)):
                rows = torch.from_numpy(np.array(features[block], dtype=np.float32)).to(self.device)
                found[block] = heads(rows)[1].cpu().numpy()
        return found

    def save(self, directory: Path) -> None:
        """Writes heads, feature standardisation and class embeddings (safetensors) and everything else (JSON)."""
        heads = self._fitted_heads()
        about = {
            "params": self.params.model_dump(),
            "seed": self.seed,
            "class_names": list(self.class_names_),
            "best_epoch": self.best_epoch_,
            "history": self.history_,
            "report": self.report_.to_json(),
        }
        save_heads(directory, heads, self.class_embeddings_, self.backbone_, about)

    @classmethod
    def load(cls, directory: Path, *, device: str = "cpu") -> PatchClustering:
        """What `save` wrote."""
        heads, class_embeddings, backbone, about = load_heads(directory)
        model = cls(ClusteringParams(**about["params"]), seed=about["seed"], device=device)
        model.heads_, model.class_embeddings_, model.backbone_ = heads.to(device), class_embeddings, backbone
        model.class_names_, model.best_epoch_ = tuple(about["class_names"]), about["best_epoch"]
        model.history_, model.report_ = about["history"], ClusterReport.from_json(about["report"])
        return model

    def _fitted_heads(self) -> ClusterHeads:
        if not hasattr(self, "heads_"):
            raise NotFitted("This PatchClustering is not fitted; call fit or load first.")
        return self.heads_

    def _choose_epoch(
        self, task: _Task, held_out: IntArray, image_features: LabelledFeatures | None, on_progress: OnProgress
    ) -> list[str]:
        """Trains without the classes `held_out`, watches their zero-shot score, sets `best_epoch_`; returns notes."""
        train = np.setdiff1d(np.arange(len(task.table.class_names)), held_out)
        if len(held_out) < 2 or len(train) < 2:
            return ["The epoch was not chosen: that needs two validation classes and two others."]
        features, classes = task.images(image_features)
        scorer = ValidationScorer(features, classes, task.knowledge, train, held_out)
        run = _Run(self, task, train)
        n_images = len(features) if image_features is not None else 0
        epochs: list[int] = []
        scores: list[float] = []
        untouched = -np.inf
        if run.warms_up:  # perhaps the network is best left as it is: then no epoch of its training is chosen
            losses = run.warm_up()
            accuracy, log_probability = scorer(class_means(run.heads, run.cached)[0].cpu().numpy())
            untouched = log_probability
            losses |= {"validation": accuracy, "validation_log_probability": log_probability}
            self.history_.append({"stage": "warm-up", **losses})
        for epoch in range(1, self.params.epochs + 1):
            losses = run.epoch()
            if n_images and isinstance(run.rows, BackboneRows):  # images are recognised by the network that is trained
                fresh = run.rows.images(n_images)
                if fresh is not None:
                    scorer = ValidationScorer(fresh, classes, task.knowledge, train, held_out)
            accuracy, log_probability = scorer(class_means(run.heads, run.patches)[0].cpu().numpy())
            epochs.append(epoch)
            scores.append(log_probability)
            losses |= {"validation": accuracy, "validation_log_probability": log_probability}
            self._record("choose", losses, on_progress, 2 * self.params.epochs)
            self.best_epoch_ = best_epoch(epochs, scores)
            if scores[self.best_epoch_ - 1] <= untouched:
                self.best_epoch_ = 0
            if epoch - self.best_epoch_ >= self.params.patience:
                break
        return []

    def _record(self, stage: str, losses: dict[str, float], on_progress: OnProgress, total: int) -> None:
        self.history_.append({"stage": stage, **losses})
        on_progress(Progress("clustering", self._n_passes(), total, losses))

    def _n_passes(self) -> int:
        """Epochs done, but for the quick ones that warm up."""
        return sum(entry["stage"] != "warm-up" for entry in self.history_)


class _Task:
    """Everything that both runs (choosing, fitting) start from."""

    def __init__(
        self,
        table: PatchTable,
        knowledge: FloatArray,
        neighbours: NeighbourLists,
        centre: FloatArray,
        spread: FloatArray,
        backbone: TrainableBackbone | None,
    ) -> None:
        self.table, self.knowledge, self.neighbours, self.backbone = table, knowledge, neighbours, backbone
        self.centre = torch.from_numpy(centre)
        # a column that never changes must not be divided by (nearly) nothing
        self.scale = torch.from_numpy(spread).clamp_min(1e-3 * max(float(spread.mean()), 1e-6))
        self.classes = patch_classes(table)

    def images(self, given: LabelledFeatures | None) -> tuple[FloatArray, IntArray]:
        """Image features (N, D) and classes (N,), numbered as the table's."""
        if given is not None:
            numbers = class_numbers(self.table.class_names, given.class_names)
            return given.features, numbers[given.labels]
        numbers, first, count = np.unique(self.table.image_index, return_index=True, return_counts=True)
        sums = np.add.reduceat(self.table.features, first, axis=0, dtype=np.float32)
        return sums / count[:, None].astype(np.float32), self.table.labels[numbers]

    def rows(self, keep: IntArray, share: float, device: str) -> FeatureRows:
        if self.backbone is not None:
            return BackboneRows(self.backbone, keep, share=share, device=device)
        return CachedRows(self.table.features, keep, device=device)


class _Run:
    """Training from fresh heads on the patches of the classes `members` (ascending)."""

    def __init__(self, owner: PatchClustering, task: _Task, members: IntArray) -> None:
        params, device = owner.params, owner.device
        keep = np.flatnonzero(np.isin(task.classes, members))
        if len(keep) < params.n_clusters:
            raise TooFewSamples(f"{len(keep)} patches cannot fill {params.n_clusters} clusters.")
        self.params = params
        self.rows = task.rows(keep, params.finetuned_share, device)
        self.patches = PatchSet(
            features=self.rows,
            classes=_tensor(np.searchsorted(members, task.classes[keep]), device),
            images=_tensor(np.unique(task.table.image_index[keep], return_inverse=True)[1], device),
            neighbours=task.neighbours.restricted(_tensor(keep, device)),
            knowledge=torch.from_numpy(task.knowledge[members]).to(device),
        )
        self.heads = seeded_heads(
            task.centre,
            task.scale,
            n_clusters=params.n_clusters,
            n_classes=len(members),
            knowledge_dim=task.knowledge.shape[1],
            head_input=params.head_input,
            seed=owner.seed,
        ).to(device)
        self.warms_up = task.backbone is not None and params.warmup_epochs > 0
        if self.warms_up:
            self.cached = replace(self.patches, features=CachedRows(task.table.features, keep, device=device))
        self.generator = torch.Generator().manual_seed(owner.seed)
        groups: list[dict[str, Any]] = [{"params": list(self.heads.parameters())}]
        if isinstance(self.rows, BackboneRows):
            groups.append(self.rows.parameter_group(params.backbone_learning_rate))
        self.optimizer = torch.optim.Adam(groups, lr=params.learning_rate, weight_decay=params.weight_decay, fused=True)

    def warm_up(self) -> dict[str, float]:
        """Trains the heads on the features as they are: what random heads ask for would spoil the network's layers."""
        losses: dict[str, float] = {}
        for _ in range(self.params.warmup_epochs):
            losses = self._train(self.cached)
        return losses

    def epoch(self) -> dict[str, float]:
        return self._train(self.patches)

    def _train(self, patches: PatchSet) -> dict[str, float]:
        losses = train_epoch(self.heads, patches, self.params, self.optimizer, self.generator)
        if not np.isfinite(losses["loss"]):
            name = "backbone_learning_rate" if isinstance(patches.features, BackboneRows) else "learning_rate"
            raise InvalidInput(
                f"Clustering diverged: its loss is no number any more. Lower params.clustering.{name}.",
                field=f"params/clustering/{name}",
            )
        return losses


def _tensor(numbers: IntArray, device: str) -> Tensor:
    return torch.from_numpy(np.asarray(numbers, dtype=np.int64)).to(device)
