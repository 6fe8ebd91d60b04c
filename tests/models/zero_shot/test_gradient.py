"""Choosing the epoch, and what all classifiers that learn by gradient descent share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from models.base import OnProgress
from models.catalog import METHODS, get_method
from models.classifier_params import GradientParams, SJEParams
from models.errors import Diverged, InvalidInput
from models.evaluation import mean_per_class_accuracy
from models.zero_shot import epochs
from models.zero_shot.base import create_classifier
from models.zero_shot.bilinear import Bilinear
from models.zero_shot.checkpoints import Run
from models.zero_shot.checks import unit_embeddings
from models.zero_shot.epochs import best_epoch, choose_epoch, refuse_divergence
from models.zero_shot.folds import Rows
from models.zero_shot.gradient import GradientModel, TrainingData
from models.zero_shot.sje import SJE
from tests.models.zero_shot.made_up import made_up

GRADIENT_METHODS = [method.name for method in METHODS if issubclass(method.params, GradientParams)]


def test_best_epoch_is_smoothed_and_takes_the_earliest_of_equals() -> None:
    assert best_epoch([0.1, 0.9, 0.1, 0.1, 0.6, 0.6, 0.6, 0.6]) == 7
    assert best_epoch([0.5] * 6) == 1


def test_epoch_over_folds_is_the_best_of_their_mean() -> None:
    rising = [0.1 * i for i in range(1, 9)]
    assert choose_epoch([rising]) == choose_epoch([rising, rising]) == best_epoch(rising) == 8
    falling = [0.9 - 0.02 * i for i in range(8)]
    assert choose_epoch([rising, falling]) == 8  # the rise is the steeper one
    assert choose_epoch([[0.5, 0.6, 0.7], [0.5] * 9]) <= 3  # the short one stays where it stopped


def test_chosen_epoch_is_the_one_trained_and_without_early_stopping_all_are() -> None:
    data = made_up()
    for early, expected in ((True, None), (False, 9)):
        params = SJEParams(epochs=9, learning_rate=0.01, early_stopping=early, folds=1)
        model = SJE(params).fit(data.train, data.seen_embeddings, validation_classes=("class 0", "class 1", "class 2"))
        t1 = [entry.get("validation_t1", 0.0) for entry in model.history_]
        assert model.best_epoch_ == (expected or best_epoch(t1))


def test_patience_ends_the_search_early() -> None:
    data = made_up()
    long, short = (
        SJE(SJEParams(epochs=60, learning_rate=0.05, patience=patience, folds=1)).fit(
            data.train, data.seen_embeddings, validation_classes=("class 0", "class 1", "class 2")
        )
        for patience in (60, 5)
    )
    assert len(long.history_) == 60
    assert len(short.history_) < 60
    assert short.best_epoch_ is not None
    assert short.best_epoch_ <= len(short.history_) - 5


def test_the_chosen_epoch_of_a_single_fold_is_not_trained_again(monkeypatch: pytest.MonkeyPatch) -> None:
    data = made_up()
    params = SJEParams(epochs=30, learning_rate=0.02, patience=8, folds=1)
    calls: list[int] = []
    original = SJE._epochs

    def counted(self: SJE, train: Rows, run: Run, epochs: int, on_progress: OnProgress) -> Iterator[dict[str, float]]:
        calls.append(epochs)
        return original(self, train, run, epochs, on_progress)

    monkeypatch.setattr(SJE, "_epochs", counted)
    inputs = data.train, data.seen_embeddings
    kept = SJE(params).fit(*inputs, validation_classes=("class 0", "class 1", "class 2"))
    assert calls == [30, kept.best_epoch_]  # the search, and all seen classes
    monkeypatch.setattr(epochs._Snapshots, "restore", lambda *_: False)
    again = SJE(params).fit(*inputs, validation_classes=("class 0", "class 1", "class 2"))
    assert len(calls) == 5
    assert (kept.validation_, kept.gamma_, kept.temperature_) == (again.validation_, again.gamma_, again.temperature_)


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    data = made_up()
    SJE(SJEParams(epochs=1)).fit(data.train, data.seen_embeddings).save(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({**state, "weight": np.zeros((23, 8), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(InvalidInput, match=r"saved weight is \(23, 8\), not \(24, 8\)"):
        SJE.load(tmp_path)


@pytest.mark.parametrize("name", GRADIENT_METHODS)
def test_it_is_the_loss_that_makes_a_method_recognise_unseen_classes(name: str) -> None:
    """Trained on its loss far above chance; on a loss without a gradient, or its negative, not."""
    data = made_up(n_seen=20, n_unseen=8)
    method = get_method(name, "classifier")

    def t1(factor: float) -> float:
        params = method.params.model_validate({"epochs": 10, "learning_rate": 0.01, "batch_size": 32})
        model = create_classifier(name, params)
        assert isinstance(model, GradientModel)
        objective = model._objective

        def scaled(training: TrainingData) -> Callable[[Tensor], Tensor]:
            loss = objective(training)
            return lambda rows: factor * loss(rows)

        model._objective = scaled  # type: ignore[assignment]  # in place of its own
        scores = model.fit(data.train, data.seen_embeddings).scores(data.unseen.features, data.unseen_embeddings)
        return mean_per_class_accuracy(scores.argmax(axis=1), data.unseen.labels, range(8))

    assert t1(1.0) > 0.6
    assert t1(0.0) < 0.4
    assert t1(-1.0) < 0.2


@pytest.mark.parametrize(
    ("method", "rate"),
    [
        ("sje", "learning_rate"),
        ("cada_vae", "learning_rate"),
        ("f_vaegan", "learning_rate"),
        ("tf_vaegan", "learning_rate"),
        ("se_gzsl", "decomposition_learning_rate"),
        ("sc_egg", "embedding_learning_rate"),
    ],
)
def test_a_training_that_diverges_says_what_to_lower(method: str, rate: str) -> None:
    schema = get_method(method, "classifier").params
    few = {"epochs": 2, "steps_per_epoch": 10, "hidden_dim": 8, "normalize": "none"}
    params = schema.model_validate({name: value for name, value in few.items() if name in schema.model_fields})
    data = made_up()
    # Past any bound: what diverges within the bounds depends on the data.
    too_large = params.model_copy(update={rate: float("inf")})
    with pytest.raises(Diverged, match=rf"diverged at epoch 1; lower {rate}\.") as caught:
        create_classifier(method, too_large).fit(data.train, data.seen_embeddings)
    assert caught.value.field == f"params/{rate}"


def test_a_last_step_that_diverges_is_seen_in_the_weights() -> None:
    network = Bilinear(3, 2, torch.Generator().manual_seed(0))
    refuse_divergence({"loss": 1.0}, 1, network)
    with pytest.raises(Diverged):
        refuse_divergence({"loss": 1.0, "other": float("inf")}, 1, network)
    with torch.no_grad():
        network.weight[0, 0] = torch.nan
    with pytest.raises(Diverged):
        refuse_divergence({"loss": 1.0}, 1, network)


def test_features_may_be_any_view_of_an_array() -> None:
    data, params = made_up(), SJEParams(epochs=1, normalize="none")
    backwards = replace(data.train, features=data.train.features[::-1], labels=data.train.labels[::-1])
    copied = replace(backwards, features=backwards.features.copy(), labels=backwards.labels.copy())
    one, other = (SJE(params).fit(rows, data.seen_embeddings) for rows in (backwards, copied))
    scores = one.scores(data.unseen.features[::-1], data.unseen_embeddings[::-1])
    assert np.array_equal(scores, other.scores(data.unseen.features[::-1].copy(), data.unseen_embeddings[::-1].copy()))


@pytest.mark.parametrize("scale", [1e-30, 1e-21, 1e-18, 1.0, 1e20])
def test_embeddings_of_any_length_become_unit_vectors(scale: float) -> None:
    rows = made_up().seen_embeddings.astype(np.float64)
    found = unit_embeddings(rows * scale)
    np.testing.assert_allclose(found, rows / np.linalg.norm(rows, axis=1, keepdims=True), rtol=1e-6)
