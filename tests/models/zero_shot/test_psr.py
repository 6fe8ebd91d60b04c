"""PSR's equations, mining and baselines against loops over images and classes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from models.base import FloatArray
from models.classifier_params import PSRParams
from models.zero_shot.psr import PSR
from models.zero_shot.scaling import unit_rows
from models.zero_shot.tuples import Mined, Relations, TupleMiner
from tests.models.zero_shot.made_up import made_up

DATA = made_up(n_seen=7, images=4)
# So many candidates that every related image is among them, and the hardest is that of all.
STILL: dict[str, Any] = {
    "epochs": 1, "learning_rate": 1e-12, "batch_size": 1000, "hidden_dims": [6, 5], "n_candidates": 3000
}  # fmt: skip


def cosine(p: FloatArray, q: FloatArray) -> float:
    return float(sum(a * b for a, b in zip(p, q, strict=True)) / math.sqrt(sum(p * p) * sum(q * q)))


def layers(state: dict[str, FloatArray], part: str, row: FloatArray) -> FloatArray:
    """Encoder or decoder by hand: linear layers, ReLU between them, ELU at the end."""
    for layer, last in ((0, False), (2, False), (4, True)):
        row = state[f"{part}.{layer}.weight"] @ row + state[f"{part}.{layer}.bias"]
        row = np.array([(value if value > 0 else math.expm1(value)) if last else max(value, 0.0) for value in row])
    return row


def parts_by_hand(model: PSR) -> tuple[FloatArray, FloatArray, list[FloatArray]]:
    """Standardised images and class vectors, and each class's f(y)."""
    state = {name: array.astype(np.float64) for name, array in model._state().items()}
    unit = unit_rows(DATA.seen_embeddings).astype(np.float64)
    vectors = (unit - unit.mean(axis=0)) / unit.std(axis=0)
    features = DATA.train.features.astype(np.float64)
    images = (features - features.mean(axis=0)) / features.std(axis=0)
    return images, vectors, [layers(state, "encoder", y) for y in vectors]


def plain_loss(model: PSR, variant: str, tau: float, lambda1: float, lambda2: float) -> float:
    """Eq. 2-5 with the hardest of all images, one anchor after the other."""
    images, vectors, mapped = parts_by_hand(model)
    state = {name: array.astype(np.float64) for name, array in model._state().items()}
    labels = DATA.train.labels
    total = 0.0
    for x, r in zip(images, labels, strict=True):
        similar, dissimilar = [], []
        for other, c in zip(images, labels, strict=True):
            delta, s = cosine(vectors[c], vectors[r]), cosine(mapped[r], other)
            if c == r:
                continue
            if variant != "B2" and delta >= tau:
                similar.append(max(0.0, tau - s) + max(0.0, s - delta))
            else:
                dissimilar.append((tau - delta) * s)
        if variant == "B1":
            total += float(np.mean((mapped[r] - x) ** 2))
        else:
            total += -cosine(mapped[r], x) + max(dissimilar, default=0.0) + lambda1 * max(similar, default=0.0)
        total += lambda2 * sum((vectors[r] - layers(state, "decoder", mapped[r])) ** 2)
    return total / len(labels)


@pytest.mark.parametrize(
    ("variant", "as_if"),
    [("full", (0.1, 0.7, 0.3)), ("B1", (0.1, 0.7, 0.3)), ("B2", (1.0, 0.0, 0.3)), ("B3", (0.1, 0.7, 0.0))],
)
def test_loss_equals_the_printed_equations(variant: str, as_if: tuple[float, float, float]) -> None:
    params = PSRParams.model_validate({**STILL, "variant": variant, "tau": 0.1, "lambda1": 0.7, "lambda2": 0.3})
    model = PSR(params).fit(DATA.train, DATA.seen_embeddings)
    assert model.history_[0]["loss"] == pytest.approx(plain_loss(model, variant, *as_if), rel=1e-4)


@pytest.mark.parametrize("tau", [-0.999, 0.999])
def test_terms_without_classes_are_left_out(tau: float) -> None:
    """At these thresholds every other class is similar, or none is."""
    params = PSRParams.model_validate({**STILL, "tau": tau, "lambda1": 0.7, "lambda2": 0.3})
    model = PSR(params).fit(DATA.train, DATA.seen_embeddings)
    assert model.history_[0]["loss"] == pytest.approx(plain_loss(model, "full", tau, 0.7, 0.3), rel=1e-4)


def test_scores_are_cosines_of_mapped_classes_and_images() -> None:
    model = PSR(PSRParams.model_validate(STILL)).fit(DATA.train, DATA.seen_embeddings)
    images, _, mapped = parts_by_hand(model)
    expected = [[cosine(f, x) for f in mapped] for x in images]
    np.testing.assert_allclose(model.scores(DATA.train.features, DATA.seen_embeddings), expected, atol=1e-5)


def test_a_class_is_never_similar_to_itself_even_where_two_classes_share_a_vector() -> None:
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.2], [0.0, 1.0]])
    relations = Relations.of(vectors, 0.0)
    assert relations.similar.int().tolist() == [[0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 0]]
    assert relations.dissimilar.int().tolist() == [[0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert not Relations.of(vectors, None).similar.any()
    assert (Relations.of(vectors, None).dissimilar == ~torch.eye(4, dtype=torch.bool)).all()


def miner(n_candidates: int = 8, seed: int = 0) -> TupleMiner:
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([2, 0, 1, 1, 3, 0, 2, 2, 2, 3])
    features = torch.nn.functional.normalize(torch.randn(10, 5, generator=generator), dim=1)
    vectors = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.2], [0.9, 1.0]])
    return TupleMiner(features, labels, Relations.of(vectors, 0.0), n_candidates, torch.Generator().manual_seed(seed))


def test_candidates_are_even_draws_from_images_of_related_classes() -> None:
    mined = miner(n_candidates=40_000)
    labels = torch.arange(4)
    for totals, related in (
        (mined.totals_similar, mined.relations.similar),
        (mined.totals_dissimilar, mined.relations.dissimilar),
    ):
        drawn = mined.draw(labels, totals)
        assert drawn.shape == (4, 40_000)
        for label in range(4):
            allowed = [row for row, own in enumerate(mined.labels.tolist()) if related[label, own]]
            if allowed:
                share = torch.bincount(drawn[label], minlength=10) / 40_000
                expected = [1 / len(allowed) if row in allowed else 0.0 for row in range(10)]
                np.testing.assert_allclose(share, expected, atol=0.01)
    assert mined.relations.similar[2].sum() == 0  # so one of the classes had none to draw from


@pytest.mark.parametrize("similar", [True, False])
@pytest.mark.parametrize("rows_read", [0, 100])
def test_the_hardest_of_the_candidates_is_kept(similar: bool, rows_read: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.zero_shot.tuples.ROWS_READ", rows_read)  # 0: rows are read one by one
    tau = 0.2
    first, again = miner(), miner()
    labels = first.labels[:6]
    anchors = torch.nn.functional.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(4)), dim=1)
    cosines = first.cosines(anchors, torch.arange(6))
    found: Mined = (first.hardest_similar if similar else first.hardest_dissimilar)(cosines, labels, tau)
    candidates = again.draw(labels, again.totals_similar if similar else again.totals_dissimilar)
    for b, label in enumerate(labels.tolist()):
        related = (first.relations.similar if similar else first.relations.dissimilar)[label]
        assert bool(found.exists[b]) == bool(related.any())
        if not related.any():
            continue
        values = []
        for row in candidates[b].tolist():
            s, delta = float(anchors[b] @ first.features[row]), float(first.relations.delta[label, first.labels[row]])
            values.append(max(0, tau - s) + max(0, s - delta) if similar else (tau - delta) * s)
        assert int(found.rows[b]) == int(candidates[b, int(np.argmax(values))])
        assert float(found.delta[b]) == float(first.relations.delta[label, first.labels[found.rows[b]]])


def test_reading_in_chunks_or_comparing_with_all_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    anchors = torch.nn.functional.normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(4)), dim=1)
    position, labels = torch.tensor([2, 0, 1, 1, 3, 0]), torch.tensor([2, 0, 1, 1, 3, 0])

    def found() -> torch.Tensor:
        mined = miner()
        return mined.hardest_dissimilar(mined.cosines(anchors, position), labels, 0.0).rows

    compared = found()
    monkeypatch.setattr("models.zero_shot.tuples.ROWS_READ", 0)
    whole = found()
    monkeypatch.setattr("models.zero_shot.tuples.CHUNK", 8 * 5 * 2)
    assert torch.equal(compared, whole)
    assert torch.equal(whole, found())


def test_images_of_a_class_without_a_vector_are_like_its_relatives() -> None:
    """The nearer a class's own vector is to the hidden one's, the higher its place."""
    data = made_up(n_seen=30, images=15)
    model = PSR(PSRParams(epochs=15, batch_size=32, hidden_dims=(64,))).fit(data.train, data.seen_embeddings)
    unit = unit_rows(np.concatenate([data.seen_embeddings, data.unseen_embeddings]))
    vectors = (unit - unit[:30].mean(axis=0)) / unit[:30].std(axis=0)
    agreement = []
    for c in range(4):
        images = data.unseen.features[data.unseen.labels == c]
        delta = unit_rows(vectors[:30]) @ unit_rows(vectors[30 + c : 31 + c])[0]
        for row in model.scores(images, data.seen_embeddings):
            agreement += [np.mean(delta[row >= 0]), -np.mean(delta[row < 0])]
    assert np.mean(agreement) > 0.2


def test_constant_dimension_of_the_class_vectors_does_no_harm() -> None:
    data = made_up()
    embeddings = np.repeat(np.eye(4, dtype=np.float32), 3, axis=0)
    embeddings = np.concatenate([embeddings, np.zeros((12, 2), np.float32)], axis=1)
    model = PSR(PSRParams(epochs=2)).fit(data.train, embeddings)  # and four groups of classes with one vector each
    assert np.isfinite(model.scores(data.train.features, embeddings)).all()


def test_each_variant_learns() -> None:
    data = made_up()
    for variant in ("full", "B1", "B2", "B3"):
        params = PSRParams.model_validate({"variant": variant, "epochs": 15, "batch_size": 32, "hidden_dims": [64]})
        model = PSR(params).fit(data.train, data.seen_embeddings)
        scores = model.scores(data.unseen.features, data.unseen_embeddings)
        assert np.mean(scores.argmax(axis=1) == data.unseen.labels) > 0.6, variant
