"""APN on places against loops; and its fine-tuned form: what learns, what is chosen, saved, resumed and refused."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from models.backbone_parts import Trunk, TrunkFeatures
from models.backbones import create_backbone
from models.base import FloatArray, LabelledFeatures, OnProgress, Progress, ignore_progress
from models.errors import Cancelled, InvalidInput, NotFitted, ShapeMismatch
from models.evaluation import mean_per_class_accuracy
from models.spatial_params import APNSpatialParams
from models.zero_shot import checkpoints
from models.zero_shot.apn_spatial import APNSpatial, compactness, decorrelation
from models.zero_shot.base import load_classifier
from models.zero_shot.checkpoints import FileCheckpoints
from models.zero_shot.scaling import unit_rows
from tests.models.zero_shot.made_up import MadeUp, made_up
from tests.reference import softmax

DATA = made_up()
UNIT = unit_rows(DATA.seen_embeddings).astype(np.float64)
STILL: dict[str, Any] = {"epochs": 1, "learning_rate": 1e-12, "batch_size": 1000}
WEIGHTS = {
    "regression_weight": 0.7, "prototype_weight": 0.6, "decorrelation_weight": 0.3, "compactness_weight": 0.9,
}  # fmt: skip
GROUPS = (4, 4, 0, 0, 0, 7, 7, 7)
TUNED: dict[str, Any] = {
    "mode": "finetune", "finetuned_share": 0.3, "epochs": 8, "warmup_epochs": 4, "batch_size": 20, "folds": 1,
    "learning_rate": 0.01, "backbone_learning_rate": 3e-3, "patience": 100,
}  # fmt: skip
VALIDATION = ("class 1", "class 5", "class 9")


def params(**settings: Any) -> APNSpatialParams:
    return APNSpatialParams.model_validate(settings)


@cache
def trunk() -> Trunk:
    return Trunk(create_backbone("small_cnn", weights=None), 32, 0.3)


@cache
def photos(images: int = 5) -> MadeUp:
    """Photos whose two halves are coloured by their class's embedding (6 dimensions), as `trunk` sees them."""
    rng = np.random.default_rng(3)
    embeddings = rng.normal(size=(16, 6)).astype(np.float32)
    labels = np.repeat(np.arange(16), images)
    colours = 128 + 55 * embeddings[labels] + rng.normal(0, 8, size=(len(labels), 6))
    pixels = np.repeat(colours.reshape(-1, 3, 1, 2), 16, axis=3).repeat(32, axis=2)
    pixels = np.clip(pixels + rng.normal(0, 20, pixels.shape), 0, 255).astype(np.uint8)
    with torch.random.fork_rng(devices=[]):
        features = trunk().features(torch.from_numpy(pixels)).numpy()
    names, seen, tail = tuple(f"class {i}" for i in range(16)), labels < 12, trunk().tail()
    return MadeUp(
        TrunkFeatures(features[seen], labels[seen], names[:12], tail=tail),
        embeddings[:12],
        TrunkFeatures(features[~seen], labels[~seen] - 12, names[12:], tail=tail),
        embeddings[12:],
    )


@cache
def tuned() -> tuple[APNSpatial, int]:
    """The model, and how often its training told of itself."""
    data, reports = photos(), list[Progress]()
    model = APNSpatial(params(**TUNED))
    model.fit(data.train, data.seen_embeddings, validation_classes=VALIDATION, on_progress=reports.append)
    return model, len(reports)


def plain_attributes(model: APNSpatial, features: FloatArray) -> tuple[FloatArray, FloatArray]:
    """v (N, E) and M (N, R, E) by loops over images, places and dimensions."""
    state = {name: np.asarray(array, np.float64) for name, array in model._state().items()}
    v, found = [], []
    for row in np.asarray(features, np.float64):
        places = [row[12 * i : 12 * i + 12] for i in range(2)]
        pooled = (places[0] + places[1]) / 2
        if model.params.unit_places:
            pooled, *places = ((p - state["centre"]) / np.linalg.norm(p - state["centre"]) for p in (pooled, *places))
        if model.params.pooling == "mean":
            v.append([pooled @ state["whole"][:, k] for k in range(8)])
        else:
            v.append([max(place @ state["whole"][:, k] for place in places) for k in range(8)])
        found.append([[place @ state["prototypes"][:, k] for k in range(8)] for place in places])
    return np.array(v), np.array(found)


def cross_entropy(scores: FloatArray, *, double: bool) -> float:
    total = 0.0
    for row, label in zip(scores.tolist(), DATA.train.labels, strict=True):
        total -= math.log(softmax(softmax(row) if double else row)[label])
    return total / len(scores)


def plain_decorrelation(weights: FloatArray, groups: tuple[int, ...] | None) -> float:
    if groups is None:
        return math.sqrt(sum(w * w for w in weights.ravel()))
    total = 0.0
    for group in set(groups):
        for channel in weights:
            total += math.sqrt(sum(w * w for w, g in zip(channel, groups, strict=True) if g == group))
    return total


def plain_compactness(found: FloatArray, width: int) -> float:
    terms = []
    for image in found:
        for k in range(image.shape[1]):
            peak = int(np.argmax(image[:, k]))
            for place, m in enumerate(image[:, k]):
                squared = (place // width - peak // width) ** 2 + (place % width - peak % width) ** 2
                terms.append(squared / (1 + math.exp(-m)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"double_softmax": True, "scored_by": "prototypes"},
        {"attribute_groups": GROUPS, "unit_places": False, "scored_by": "both"},
        {"pooling": "max", "attribute_groups": GROUPS},
    ],
)
def test_loss_and_scores_are_the_papers_sums(settings: dict[str, Any]) -> None:
    model = APNSpatial(params(**STILL, **WEIGHTS, **settings)).fit(DATA.train, DATA.seen_embeddings)
    v, found = plain_attributes(model, DATA.train.features)
    local, double = found.max(axis=1), model.params.double_softmax
    expected = cross_entropy(v @ UNIT.T, double=double) + 0.6 * cross_entropy(local @ UNIT.T, double=double)
    expected += 0.7 * float(np.mean((local - UNIT[DATA.train.labels]) ** 2))
    for name in ("whole", "prototypes"):
        expected += 0.3 * plain_decorrelation(model._state()[name].astype(np.float64), model.params.attribute_groups)
    expected += 0.9 * plain_compactness(found, 2)
    assert model.history_[0]["loss"] == pytest.approx(expected, rel=1e-4)
    joined = {"global": v, "prototypes": local, "both": v + local}[model.params.scored_by]
    np.testing.assert_allclose(model.scores(DATA.train.features, UNIT), joined @ UNIT.T, rtol=1e-3, atol=1e-4)


def test_compactness_counts_squared_places_from_the_peak_on_a_square_grid() -> None:
    found = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(0))
    assert float(compactness(found)) == pytest.approx(plain_compactness(found.double().numpy(), 3), rel=1e-5)
    sharp = torch.full((1, 9, 1), -30.0)
    sharp[0, 4] = 30.0
    assert float(compactness(sharp)) < 1e-9
    sharp[0, 8] = 29.0
    assert float(compactness(sharp)) == pytest.approx(2 / 9)


def test_decorrelation_prefers_channels_that_serve_one_group() -> None:
    groups = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    apart = torch.tensor([[2.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
    mixed = torch.tensor([[2.0, 0.0, 2.0], [0.0, 2.0, 0.0]])
    assert float(decorrelation(apart, groups)) < float(decorrelation(mixed, groups))
    assert float(decorrelation(apart, None)) == float(decorrelation(mixed, None))
    still = torch.zeros(2, 3, requires_grad=True)
    decorrelation(still, groups).backward()  # type: ignore[no-untyped-call]  # torch gives it no types
    assert still.grad is not None
    assert torch.equal(still.grad, torch.zeros(2, 3))


def test_on_frozen_maps_prototypes_do_not_change_the_global_branch() -> None:
    scores = []
    for weight in (0.0, 5.0):
        settings = params(epochs=4, compactness_weight=weight, regression_weight=weight, prototype_weight=weight)
        model = APNSpatial(settings).fit(DATA.train, DATA.seen_embeddings)
        scores.append(model.scores(DATA.unseen.features, DATA.unseen_embeddings))
    np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-5)


def test_prototypes_find_an_attribute_at_its_place() -> None:
    """Three dimensions, each a channel's answer at a place of its own; the prototypes' maps peak there."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 10)
    phi = unit_rows(rng.uniform(0.1, 1, size=(12, 3))).astype(np.float32)
    maps = rng.normal(0, 0.05, size=(120, 9, 5)).astype(np.float32)
    where = rng.integers(0, 9, size=(120, 3))
    for k in range(3):
        maps[np.arange(120), where[:, k], k] += phi[labels, k]
    train = LabelledFeatures(maps.reshape(120, -1), labels, tuple(f"class {i}" for i in range(12)), channels=5)
    weights = {"regression_weight": 1000, "prototype_weight": 0, "decorrelation_weight": 0, "compactness_weight": 0}
    settings = params(epochs=60, learning_rate=0.02, unit_places=False, batch_size=20, **weights)
    model = APNSpatial(settings).fit(train, phi)
    with torch.no_grad():
        found = model.network.attributes(model.network.places(torch.from_numpy(train.features)))[1].numpy()
    strong = phi[labels] > 0.5
    assert np.mean(found.argmax(axis=1)[strong] == where[strong]) > 0.9


def test_attention_is_where_the_prototypes_of_the_class_answer() -> None:
    generator = np.random.default_rng(1)
    maps = np.abs(generator.normal(size=(40, 4 * 6))).astype(np.float32)
    train = LabelledFeatures(maps, np.arange(40) % 4, ("a", "b", "c", "d"), channels=6)
    phi = generator.normal(size=(4, 5)).astype(np.float32)
    with pytest.raises(NotFitted):
        APNSpatial().attention(maps, phi[train.labels])
    model = APNSpatial(params(epochs=2)).fit(train, phi)
    looked = model.attention(maps, 3 * phi[train.labels], top=3)
    with torch.no_grad():
        found = model.network.attributes(model.network.places(torch.from_numpy(maps)))[1].numpy()
    strengths = found.max(axis=1) * unit_rows(phi)[train.labels]
    assert np.array_equal(looked.dimensions, np.argsort(-strengths, axis=1)[:, :3])
    np.testing.assert_allclose(looked.strengths, -np.sort(-strengths, axis=1)[:, :3], rtol=1e-4, atol=1e-5)
    assert looked.local.shape == (40, 3, 2, 2)
    assert looked.whole.shape == (40, 2, 2)
    np.testing.assert_allclose(looked.local.sum(axis=(2, 3)), 1, rtol=1e-4)
    one = found[7][:, looked.dimensions[7, 0]]
    np.testing.assert_allclose(looked.local[7, 0].ravel(), (one - one.min()) / (one - one.min()).sum(), atol=1e-3)
    with pytest.raises(ShapeMismatch, match="as in training"):
        model.attention(maps[:, :20], phi[train.labels])
    data = photos()
    rows = data.unseen.features[:3]
    assert tuned()[0].attention(rows, data.unseen_embeddings[:3]).whole.shape == (3, 2, 2)


# -- the network learns, too -------------------------------------------------------------------------------------------


def test_the_tail_learns_after_the_warm_up_and_only_then() -> None:
    data = photos()
    start = {name: tensor.numpy() for name, tensor in trunk().tail().state_dict().items()}
    for epochs, is_changed in ((3, False), (5, True)):
        settings = params(**{**TUNED, "epochs": epochs, "warmup_epochs": 3, "early_stopping": False})
        state = APNSpatial(settings).fit(data.train, data.seen_embeddings)._state()
        changed = [not np.array_equal(state[f"tail.{name}"], array) for name, array in start.items()]
        assert any(changed) == is_changed
    frozen = [name for name in start if "running" in name]
    assert frozen
    assert all(np.array_equal(state[f"tail.{name}"], start[name]) for name in frozen)


def test_fine_tuning_fits_seen_classes_better_and_recognises_unseen_ones() -> None:
    data = photos()
    losses = []
    for rate in (1e-12, 3e-3):
        settings = params(**{**TUNED, "backbone_learning_rate": rate, "early_stopping": False})
        losses.append(APNSpatial(settings).fit(data.train, data.seen_embeddings).history_[-1]["loss"])
    assert losses[1] < losses[0]
    scores = tuned()[0].scores(data.unseen.features, data.unseen_embeddings)
    assert mean_per_class_accuracy(scores.argmax(axis=1), data.unseen.labels, range(4)) > 0.4


def test_the_given_tail_is_never_changed_and_seeds_decide() -> None:
    data = photos()
    assert isinstance(data.train, TrunkFeatures)
    tail = data.train.tail
    before = {name: tensor.clone() for name, tensor in tail.state_dict().items()}
    again = APNSpatial(params(**TUNED)).fit(data.train, data.seen_embeddings, validation_classes=VALIDATION)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tail.state_dict().items())
    one, other = (m.scores(data.unseen.features, data.unseen_embeddings) for m in (tuned()[0], again))
    assert np.array_equal(one, other)
    assert again.validation_ == tuned()[0].validation_


def test_saved_with_its_network_it_answers_the_same(tmp_path: Path) -> None:
    data, model = photos(), tuned()[0]
    model.save(tmp_path)
    loaded = load_classifier(tmp_path)
    one, other = (m.scores(data.unseen.features, data.unseen_embeddings) for m in (model, loaded))
    assert np.array_equal(one, other)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_a_lost_fine_tuning_goes_on_to_the_same_bits(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "SAVE_EVERY_S", 0.0)
    data, (plain, n_reports) = photos(), tuned()
    kept = FileCheckpoints(tmp_path / "state")
    left = int(share * n_reports)

    def stop(progress: Progress) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Cancelled("the worker is lost")

    def fit(on_progress: OnProgress) -> APNSpatial:
        return APNSpatial(params(**TUNED)).fit(
            data.train,
            data.seen_embeddings,
            validation_classes=VALIDATION,
            on_progress=on_progress,
            checkpoints=kept,
        )

    with pytest.raises(Cancelled):
        fit(stop)
    resumed = fit(ignore_progress)
    assert kept.load() is not None
    everything = np.concatenate([data.seen_embeddings, data.unseen_embeddings])
    one, other = (m.scores(data.unseen.features, everything) for m in (plain, resumed))
    assert np.array_equal(one, other)
    assert (plain.history_, plain.validation_) == (resumed.history_, resumed.validation_)


def test_steps_of_fine_tuning_are_told_so_that_a_cancel_need_not_wait() -> None:
    data = photos()
    reports: list[Progress] = []
    settings = params(**{**TUNED, "epochs": 3, "warmup_epochs": 1, "early_stopping": False})
    APNSpatial(settings).fit(data.train, data.seen_embeddings, on_progress=reports.append)
    share = [r.completed / (r.total or 1) for r in reports if r.phase == "training"]
    assert len(share) == 3 + 2 * 3  # epochs, and steps of those after the warm-up
    assert share == sorted(share)
    assert share[-1] == 1


def test_inputs_that_do_not_fit_are_refused() -> None:
    data = photos()
    narrow = replace(data.train, features=data.train.features[:, 1:])
    with pytest.raises(InvalidInput, match="these features are pooled"):
        APNSpatial().fit(replace(DATA.train, channels=None), DATA.seen_embeddings)
    with pytest.raises(ShapeMismatch, match="no multiple of 5 channels"):
        APNSpatial().fit(replace(DATA.train, channels=5), DATA.seen_embeddings)
    with pytest.raises(InvalidInput, match="only features are given"):
        APNSpatial(params(mode="finetune")).fit(DATA.train, DATA.seen_embeddings)
    with pytest.raises(ShapeMismatch, match="not what the network's last layers take"):
        APNSpatial(params(mode="finetune")).fit(narrow, data.seen_embeddings)
    with pytest.raises(ShapeMismatch, match="3 numbers and class embeddings have 8"):
        APNSpatial(params(attribute_groups=(0, 1, 1))).fit(DATA.train, DATA.seen_embeddings)
    with pytest.raises(ValidationError, match="'normalize' must be 'none'"):
        params(mode="finetune", normalize="zscore")


def test_no_images_have_no_scores() -> None:
    one_each = np.unique(DATA.train.labels, return_index=True)[1]
    train = replace(DATA.train, features=DATA.train.features[one_each], labels=DATA.train.labels[one_each])
    model = APNSpatial(params(epochs=1)).fit(train, DATA.seen_embeddings)  # none to spare for the calibration
    assert model.scores(np.zeros((0, 24), np.float32), DATA.unseen_embeddings).shape == (0, 4)
    tail = trunk().tail()
    assert tail(torch.zeros(0, math.prod(tail.shape))).shape[::2] == (0, tail.channels)
