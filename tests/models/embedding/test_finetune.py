from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.base import FloatArray, IntArray, LabelledFeatures, PatchTable, Progress
from models.embedding import clustering, finetune
from models.embedding.clustering import PatchClustering
from models.embedding.finetune import BackboneRows, TrainableBackbone, last_layers
from models.errors import InvalidInput
from models.params import ClusteringParams

N_CLASSES, IMAGES, PATCHES = 4, 6, 4


class _TinyNetwork(nn.Module):
    """uint8 (B, 3, 12, 12) -> (B, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.last = nn.Linear(32, 16)

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.last(self.layers(pixels.float() / 255))
        return features


def _pixels() -> Tensor:
    """Patches with a colour and a stripe direction of their class."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (N_CLASSES * IMAGES * PATCHES, 3, 12, 12), generator=generator)
    for row in range(len(images)):
        label = row // (IMAGES * PATCHES)
        images[row, label % 3] += 120
        if label >= 2:
            images[row, :, ::2] += 60
    return images.to(torch.uint8)


def _problem() -> tuple[PatchTable, FloatArray, TrainableBackbone]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = _TinyNetwork().eval()
    pixels = _pixels()

    def read(rows: IntArray) -> Tensor:
        return pixels[torch.from_numpy(np.asarray(rows))]

    with torch.inference_mode():
        features = network(pixels).numpy()
    labels = np.repeat(np.arange(N_CLASSES), IMAGES)
    table = PatchTable(features, np.repeat(np.arange(len(labels)), PATCHES), labels, ("a", "b", "c", "d"))
    knowledge = np.eye(N_CLASSES, dtype=np.float32)
    return table, knowledge, TrainableBackbone(network, read, chunk=10)


def _params(epochs: int = 8, share: float = 1.0, warmup: int = 0) -> ClusteringParams:
    return ClusteringParams(
        mode="finetune",
        n_clusters=8,
        n_neighbors=4,
        epochs=epochs,
        batch_size=32,
        learning_rate=0.02,
        backbone_learning_rate=0.002,
        finetuned_share=share,
        warmup_epochs=warmup,
    )


def _features(weights: dict[str, Tensor] | None, pixels: Tensor) -> FloatArray:
    """What the network makes of pixels with the weights that a clustering has left."""
    assert weights is not None
    network = _TinyNetwork().eval()
    network.load_state_dict(weights)
    with torch.inference_mode():
        features: FloatArray = network(pixels).numpy()
    return features


def test_the_loss_falls_and_backbone_and_heads_learn() -> None:
    table, knowledge, backbone = _problem()
    before = {name: weight.clone() for name, weight in backbone.module.state_dict().items()}
    model = PatchClustering(_params()).fit(table, knowledge, backbone=backbone)
    assert model.history_[-1]["loss"] < model.history_[0]["loss"]
    assert model.backbone_ is not None
    trained = model.backbone_
    assert not torch.equal(trained["layers.0.weight"], before["layers.0.weight"])
    assert not torch.equal(trained["last.weight"], before["last.weight"])
    for name, weight in backbone.module.state_dict().items():
        assert torch.equal(weight, before[name]), f"the caller's {name} was changed"


def test_class_embeddings_come_from_refreshed_features() -> None:
    table, knowledge, backbone = _problem()
    model = PatchClustering(_params()).fit(table, knowledge, backbone=backbone)
    fresh = _features(model.backbone_, _pixels())
    by_class = model.assign(fresh).reshape(N_CLASSES, IMAGES * PATCHES, -1).mean(axis=1)
    np.testing.assert_allclose(model.class_embeddings_, by_class, atol=1e-5)
    stale = model.assign(table.features).reshape(N_CLASSES, IMAGES * PATCHES, -1).mean(axis=1)
    assert np.abs(stale - by_class).max() > 1e-3


def test_epoch_choice_leaves_each_run_its_own_backbone() -> None:
    table, knowledge, backbone = _problem()
    chosen = PatchClustering(_params(3)).fit(table, knowledge, backbone=backbone, validation_classes=["a", "d"])
    plain = PatchClustering(_params(chosen.best_epoch_)).fit(table, knowledge, backbone=backbone)
    np.testing.assert_array_equal(chosen.class_embeddings_, plain.class_embeddings_)


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_chunks_change_neither_features_nor_gradients(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether activations are held or computed again."""
    monkeypatch.setattr(finetune, "ACTIVATION_BYTES", budget)
    _, _, backbone = _problem()
    gradients = []
    for chunk in (7, 1000):
        rows = BackboneRows(TrainableBackbone(backbone.module, backbone.read_patches, chunk=chunk), np.arange(40) * 2)
        rows.rows(torch.arange(40)).square().sum().backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        gradients.append([parameter.grad for parameter in rows.module.parameters()])
    for small, large in zip(*gradients, strict=True):
        torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-4)


def test_the_heads_warm_up_while_the_network_rests() -> None:
    table, knowledge, backbone = _problem()
    model = PatchClustering(_params(2, warmup=5)).fit(table, knowledge, backbone=backbone)
    assert [entry["stage"] for entry in model.history_] == ["warm-up", "fit", "fit"]
    cold = PatchClustering(_params(2)).fit(table, knowledge, backbone=backbone)
    assert model.history_[1]["loss"] < cold.history_[0]["loss"]
    frozen = _params(5).model_copy(update={"mode": "frozen"})
    expected = PatchClustering(frozen).fit(table, knowledge).history_[-1]
    assert model.history_[0]["loss"] == pytest.approx(expected["loss"])  # the same passes


def test_no_epoch_is_an_answer_too() -> None:
    """A step size that ruins the network: validation classes tell, and it is left as it was."""
    table, knowledge, backbone = _problem()
    pixels = _pixels()[::PATCHES]
    with torch.inference_mode():
        images = LabelledFeatures(backbone.module(pixels).numpy(), table.labels, table.class_names)
    source = TrainableBackbone(
        backbone.module, backbone.read_patches, lambda rows: pixels[torch.from_numpy(np.asarray(rows))], chunk=10
    )
    params = _params(2, warmup=5).model_copy(update={"backbone_learning_rate": 10.0})
    seen: list[Progress] = []
    model = PatchClustering(params).fit(
        table, knowledge, backbone=source, image_features=images, validation_classes=["a", "d"], on_progress=seen.append
    )
    assert model.best_epoch_ == 0
    assert [entry["stage"] for entry in model.history_] == ["warm-up", "choose", "choose", "warm-up"]
    assert model.backbone_ is not None
    assert all(torch.equal(model.backbone_[name], weight) for name, weight in backbone.module.state_dict().items())
    steps = [(step.completed, step.total) for step in seen if step.phase == "clustering"]
    assert steps == [(0, 4), (1, 4), (2, 4)]


@pytest.mark.parametrize(("mode", "name"), [("frozen", "learning_rate"), ("finetune", "backbone_learning_rate")])
def test_a_loss_that_is_no_number_ends_training(mode: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table, knowledge, backbone = _problem()
    monkeypatch.setattr(clustering, "train_epoch", lambda *args: {"loss": float("nan")})
    params = _params(2).model_copy(update={"mode": mode})
    with pytest.raises(InvalidInput, match=f"diverged.*Lower params.clustering.{name}") as caught:
        PatchClustering(params).fit(table, knowledge, backbone=backbone if mode == "finetune" else None)
    assert caught.value.field == f"params/clustering/{name}"


def test_only_the_last_layers_learn_where_a_share_is_asked_for() -> None:
    table, knowledge, backbone = _problem()
    before = {name: weight.clone() for name, weight in backbone.module.state_dict().items()}
    model = PatchClustering(_params(2, share=0.3)).fit(table, knowledge, backbone=backbone)
    assert model.backbone_ is not None
    changed = {name for name, weight in model.backbone_.items() if not torch.equal(weight, before[name])}
    assert changed == {"last.weight", "last.bias"}
    for share, n_tensors in ((0.01, 2), (0.6, 4), (1.0, 6)):
        assert len(last_layers(_TinyNetwork(), share)) == n_tensors


def test_validation_images_are_seen_by_the_network_that_is_trained() -> None:
    """Features of untrained images would tell how well yesterday's network would do."""
    table, knowledge, backbone = _problem()
    pixels = _pixels()[::PATCHES]
    read: list[int] = []

    def read_images(rows: IntArray) -> Tensor:
        read.extend(rows.tolist())
        return pixels[torch.from_numpy(np.asarray(rows))]

    with torch.inference_mode():
        images = LabelledFeatures(backbone.module(pixels).numpy(), table.labels, table.class_names)
    own = TrainableBackbone(backbone.module, backbone.read_patches, read_images, chunk=10)
    found = [
        PatchClustering(_params(3)).fit(
            table, knowledge, backbone=source, image_features=images, validation_classes=["a", "d"]
        )
        for source in (own, backbone)
    ]
    assert read[: len(pixels)] == list(range(len(pixels)))
    assert len(read) == 3 * len(pixels)  # once an epoch of the run that chooses
    scores = [[entry.get("validation_log_probability") for entry in model.history_] for model in found]
    assert scores[0] != scores[1]


def test_backbone_weights_are_saved_beside_the_heads_and_loaded_again(tmp_path: Path) -> None:
    table, knowledge, backbone = _problem()
    model = PatchClustering(_params(1)).fit(table, knowledge, backbone=backbone)
    model.save(tmp_path / "first")
    PatchClustering.load(tmp_path / "first").save(tmp_path / "again")
    for folder in ("first", "again"):
        weights = PatchClustering.load(tmp_path / folder).backbone_
        assert model.backbone_ is not None
        assert weights is not None
        assert weights.keys() == backbone.module.state_dict().keys()  # a network of the kind takes them as they are
        assert all(torch.equal(weights[name], value) for name, value in model.backbone_.items())
    frozen = _params(1).model_copy(update={"mode": "frozen"})
    PatchClustering(frozen).fit(table, knowledge).save(tmp_path / "frozen")
    assert PatchClustering.load(tmp_path / "frozen").backbone_ is None


def test_mode_and_backbone_must_agree() -> None:
    table, knowledge, backbone = _problem()
    with pytest.raises(InvalidInput, match="needs a backbone"):
        PatchClustering(_params()).fit(table, knowledge)
    frozen = _params().model_copy(update={"mode": "frozen"})
    with pytest.raises(InvalidInput, match="takes none"):
        PatchClustering(frozen).fit(table, knowledge, backbone=backbone)
