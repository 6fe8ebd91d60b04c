"""What every classifier of the catalog promises; a new row is tested the moment it is listed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.base import FloatArray, LabelledFeatures, Progress
from models.catalog import METHODS
from models.errors import Cancelled, InvalidInput, NotFitted, ShapeMismatch, TooFewSamples, UnknownName
from models.evaluation import ClassTable, evaluate, mean_per_class_accuracy
from models.generative_params import GenerativeParams
from models.params import Params
from models.zero_shot.base import ZeroShotModel, create_classifier, load_classifier
from models.zero_shot.epochs import EpochModel
from tests.models.zero_shot.made_up import made_up

NAMES = [method.name for method in METHODS if method.kind == "classifier"]
DATA = made_up()
VALIDATION = ("class 1", "class 5", "class 9")

pytestmark = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quick(name: str) -> Params:
    """The method's defaults, with few epochs where it has epochs, and small networks where it generates."""
    params = next(m.params for m in METHODS if m.name == name and m.kind == "classifier")
    if issubclass(params, GenerativeParams):
        small = {"epochs": 6, "steps_per_epoch": 20, "learning_rate": 0.005, "batch_size": 32, "hidden_dim": 48}
        has_encoders = "decomposition_epochs" in params.model_fields
        # Longer steps and a louder guidance than the defaults', as there are so few steps.
        louder = {"decomposition_epochs": 10, "decomposition_learning_rate": 0.001, "generator_information_weight": 1}
        encoders = louder if has_encoders else {}
        return params.model_validate({**small, **encoders, "folds": 1})
    return params.model_validate(
        {"epochs": 15, "learning_rate": 0.01, "batch_size": 32} if "epochs" in params.model_fields else {}
    )


def brief(name: str) -> Params:
    """The same with so few epochs and steps that little is learned, for tests that do not ask what."""
    params = quick(name)
    few = {"epochs": 2, "steps_per_epoch": 3, "decomposition_epochs": 2, "embedding_epochs": 2}
    return params.model_copy(update={field: n for field, n in few.items() if field in type(params).model_fields})


@cache
def fitted(name: str) -> ZeroShotModel:
    """One fitted model a method, for tests that only look at it."""
    return create_classifier(name, quick(name)).fit(DATA.train, DATA.seen_embeddings, validation_classes=VALIDATION)


def test_constructor_stores_parameters_and_scores_need_fit(name: str, tmp_path: Path) -> None:
    params = quick(name)
    model = create_classifier(name, params, seed=7)
    assert model.params is params
    assert model.seed == 7
    with pytest.raises(NotFitted):
        model.scores(DATA.unseen.features, DATA.unseen_embeddings)
    with pytest.raises(NotFitted):
        model.save(tmp_path)
    with pytest.raises(InvalidInput, match="not Params"):
        create_classifier(name, Params())


def test_recognises_unseen_classes(name: str) -> None:
    scores = fitted(name).scores(DATA.unseen.features, DATA.unseen_embeddings)
    assert scores.shape == (60, 4)
    assert scores.dtype == np.float32
    assert mean_per_class_accuracy(scores.argmax(axis=1), DATA.unseen.labels, range(4)) > 0.7


def test_fit_returns_self_and_learns_what_the_contract_names(name: str) -> None:
    model = create_classifier(name, quick(name))
    assert model.fit(DATA.train, DATA.seen_embeddings, validation_classes=VALIDATION) is model
    assert model.class_names_ == DATA.train.class_names
    assert model.history_
    assert np.isfinite(model.gamma_)
    assert model.temperature_ > 0
    assert model.validation_["classes"] == list(VALIDATION)
    assert model.validation_["t1"] > 1 / 3
    assert model.validation_["h"] > 0
    assert model.validation_["folds"][0] == list(VALIDATION)
    together = sorted(c for fold in model.validation_["folds"] for c in fold)
    if getattr(model.params, "folds", 1) == 1:
        assert together == sorted(VALIDATION)
    else:
        assert together == sorted(DATA.train.class_names)
        assert "4 fold(s) of together 12 seen classes" in model.validation_["reason"]
    json.dumps(model.validation_, allow_nan=False)


def test_gamma_chosen_on_validation_helps_on_test_images(name: str) -> None:
    data = made_up(noise=1.0, images=30)
    half = np.arange(len(data.train.labels)) % 2 == 0
    train, test_seen = (
        replace(data.train, features=data.train.features[rows], labels=data.train.labels[rows])
        for rows in (half, ~half)
    )
    model = create_classifier(name, quick(name)).fit(train, data.seen_embeddings, validation_classes=VALIDATION)
    classes = ClassTable(
        (*train.class_names, *data.unseen.class_names),
        np.concatenate([data.seen_embeddings, data.unseen_embeddings]),
        np.arange(16) < 12,
    )

    def h_at(gamma: float) -> float:
        found = evaluate(model, classes, test_unseen=data.unseen, test_seen=test_seen, gamma=gamma).gzsl
        assert found is not None
        return found.h

    chosen, spread = h_at(model.gamma_), model.temperature_
    assert chosen > 0.5
    for side in (-1, 1):
        assert chosen > h_at(model.gamma_ + side * 8 * spread) - 0.02  # where H is flat, one image decides
        assert chosen > h_at(model.gamma_ + side * 1000 * spread)


def test_same_seed_same_bits_and_a_second_fit_forgets_the_first(name: str) -> None:
    first, again = create_classifier(name, brief(name)), create_classifier(name, brief(name))
    other = made_up(seed=5)
    again.fit(other.train, other.seen_embeddings)
    for model in (first, again):
        model.fit(DATA.train, DATA.seen_embeddings, validation_classes=VALIDATION)
    assert np.array_equal(
        first.scores(DATA.unseen.features, DATA.unseen_embeddings),
        again.scores(DATA.unseen.features, DATA.unseen_embeddings),
    )
    assert (first.gamma_, first.temperature_) == (again.gamma_, again.temperature_)
    assert first.validation_ == again.validation_


def test_new_classes_need_no_refit_and_do_not_touch_the_others(name: str) -> None:
    model = fitted(name)
    everything = np.concatenate([DATA.seen_embeddings, DATA.unseen_embeddings])
    whole = model.scores(DATA.unseen.features, everything)
    part = model.scores(DATA.unseen.features, everything[[14, 2]])
    np.testing.assert_allclose(part, whole[:, [14, 2]], rtol=1e-4, atol=1e-5)


def test_watched_epochs_are_those_of_the_fit(name: str) -> None:
    model = fitted(name)
    if not isinstance(model, EpochModel):
        pytest.skip("does not learn in epochs")
    before = model.scores(DATA.unseen.features, DATA.unseen_embeddings)
    seen: list[FloatArray] = []

    def look(at: ZeroShotModel) -> dict[str, float]:
        seen.append(at.scores(DATA.unseen.features, DATA.unseen_embeddings))
        return {"spread": float(seen[-1].std())}

    curve = model.watch_epochs(DATA.train, DATA.seen_embeddings, look)
    assert [entry["epoch"] for entry in curve] == list(range(1, model.params.epochs + 1))
    assert np.array_equal(seen[(model.best_epoch_ or 0) - 1], before)
    assert len({entry["spread"] for entry in curve}) == len(curve)
    assert np.array_equal(model.scores(DATA.unseen.features, DATA.unseen_embeddings), before)


def test_length_of_an_embedding_does_not_matter(name: str) -> None:
    model = fitted(name)
    stretched = DATA.unseen_embeddings * np.array([[1], [10], [0.1], [3]], np.float32)
    np.testing.assert_allclose(
        model.scores(DATA.unseen.features, stretched),
        model.scores(DATA.unseen.features, DATA.unseen_embeddings),
        rtol=1e-3,
        atol=1e-4,
    )


def test_saved_classifier_answers_the_same(name: str, tmp_path: Path) -> None:
    model = fitted(name)
    model.save(tmp_path / "new" / "folder")
    loaded = load_classifier(tmp_path / "new" / "folder")
    assert type(loaded) is type(model)
    assert np.array_equal(
        loaded.scores(DATA.unseen.features, DATA.unseen_embeddings),
        model.scores(DATA.unseen.features, DATA.unseen_embeddings),
    )
    for learned in ("params", "seed", "class_names_", "history_", "best_epoch_", "gamma_", "temperature_"):
        assert getattr(loaded, learned) == getattr(model, learned)
    assert loaded.validation_ == model.validation_


def test_damaged_files_are_refused(name: str, tmp_path: Path) -> None:
    fitted(name).save(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InvalidInput, match=r"model\.safetensors"):
        load_classifier(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(InvalidInput, match="format 1"):
        load_classifier(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(InvalidInput, match=r"manifest\.json cannot be read"):
        load_classifier(tmp_path)


def test_half_precision_features_are_taken(name: str) -> None:
    train = replace(DATA.train, features=DATA.train.features.astype(np.float16))
    model = create_classifier(name, brief(name)).fit(train, DATA.seen_embeddings, validation_classes=VALIDATION)
    assert np.isfinite(model.scores(DATA.unseen.features.astype(np.float16), DATA.unseen_embeddings)).all()


def test_without_validation_classes_gamma_is_zero_and_says_so(name: str) -> None:
    model = create_classifier(name, brief(name)).fit(DATA.train, DATA.seen_embeddings)
    assert model.gamma_ == 0
    assert model.temperature_ > 0
    assert "No validation classes" in model.validation_["reason"]


def test_predicted_embeddings_may_stand_in_for_validation_classes(name: str) -> None:
    rows = DATA.seen_embeddings[[1, 5, 9]]

    def fit(params: Params, **given: Any) -> ZeroShotModel:
        model = create_classifier(name, params)
        return model.fit(DATA.train, DATA.seen_embeddings, validation_classes=VALIDATION, **given)

    only_named = brief(name).model_copy(update={"folds": 1})
    assert fit(brief(name), validation_embeddings=rows).validation_ == fit(only_named).validation_
    asked: list[list[str]] = []

    def as_unseen(names: Sequence[str]) -> FloatArray:
        asked.append(list(names))
        return DATA.seen_embeddings[[DATA.train.class_names.index(n) for n in names]]

    by_function = fit(brief(name), validation_embeddings=as_unseen)
    assert by_function.validation_ == fit(brief(name)).validation_
    assert asked == by_function.validation_["folds"]
    # The last epoch: of several, the best is now and then right about three classes for no reason.
    last = quick(name).model_copy(update={"early_stopping": False})
    right, turned = (fit(last, validation_embeddings=given) for given in (rows, rows[[1, 2, 0]]))
    assert turned.validation_["t1"] < right.validation_["t1"]
    with pytest.raises(ShapeMismatch, match="validation_embeddings"):
        fit(quick(name), validation_embeddings=rows[:2])


def test_progress_counts_up_and_cancel_passes(name: str) -> None:
    seen: list[Progress] = []
    create_classifier(name, brief(name)).fit(
        DATA.train, DATA.seen_embeddings, validation_classes=VALIDATION, on_progress=seen.append
    )
    assert seen
    assert all(p.total is not None and 0 < p.completed <= p.total for p in seen)

    def stop(progress: Progress) -> None:
        raise Cancelled("told to")

    model = create_classifier(name, brief(name))
    with pytest.raises(Cancelled):
        model.fit(DATA.train, DATA.seen_embeddings, on_progress=stop)
    with pytest.raises(NotFitted):
        model.scores(DATA.unseen.features, DATA.unseen_embeddings)


@pytest.mark.parametrize("share", [0.3, 0.95])
def test_cancel_passes_at_any_stage(name: str, share: float) -> None:
    reports: list[Progress] = []
    inputs = DATA.train, DATA.seen_embeddings
    create_classifier(name, brief(name)).fit(*inputs, validation_classes=VALIDATION, on_progress=reports.append)
    left = int(share * len(reports))

    def stop(progress: Progress) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Cancelled("told to")

    model = create_classifier(name, brief(name))
    with pytest.raises(Cancelled):
        model.fit(*inputs, validation_classes=VALIDATION, on_progress=stop)
    with pytest.raises(NotFitted):
        model.scores(DATA.unseen.features, DATA.unseen_embeddings)


def test_inputs_are_never_changed(name: str) -> None:
    given = (DATA.train.features, DATA.train.labels, DATA.seen_embeddings, DATA.unseen.features, DATA.unseen_embeddings)
    before = [array.copy() for array in given]
    for kind in ("none", "minmax"):
        params = brief(name).model_copy(update={"normalize": kind})
        model = create_classifier(name, params).fit(DATA.train, DATA.seen_embeddings, validation_classes=VALIDATION)
        model.scores(DATA.unseen.features, DATA.unseen_embeddings)
    assert all(np.array_equal(now, then) for now, then in zip(given, before, strict=True))


def test_bad_training_input_is_refused_with_the_reason(name: str) -> None:
    train, embeddings = DATA.train, DATA.seen_embeddings

    def refused(error: type[Exception], match: str, train: LabelledFeatures, rows: Any, **more: Any) -> None:
        with pytest.raises(error, match=match):
            create_classifier(name).fit(train, rows, **more)

    refused(ShapeMismatch, "11 class embeddings for 12", train, embeddings[:11])
    refused(ShapeMismatch, r"\(12,\)", train, embeddings[:, 0])
    refused(ShapeMismatch, "one row and one label", replace(train, labels=train.labels[:-1]), embeddings)
    refused(InvalidInput, "Labels must lie in 0..11", replace(train, labels=train.labels + 1), embeddings)
    broken = train.features.copy()
    broken[3, 2] = np.nan
    refused(InvalidInput, "NaN", replace(train, features=broken), embeddings)
    zero = embeddings.copy()
    zero[4] = 0
    refused(InvalidInput, "embedding 4 is zero", train, zero)
    refused(InvalidInput, "'class 99' is none", train, embeddings, validation_classes=["class 99"])
    refused(InvalidInput, "twice", train, embeddings, validation_classes=["class 1", "class 1"])
    refused(TooFewSamples, "1 seen class", train, embeddings, validation_classes=train.class_names[1:])
    refused(TooFewSamples, "'class 3'", replace(train, labels=np.where(train.labels == 3, 2, train.labels)), embeddings)
    empty = replace(train, features=train.features[:0], labels=train.labels[:0])
    refused(TooFewSamples, "no training images", empty, embeddings)
    refused(ShapeMismatch, "no numbers of an image", replace(train, features=train.features[:, :0]), embeddings)
    for kind in (complex, str):
        refused(
            InvalidInput, "features must hold real", replace(train, features=train.features.astype(kind)), embeddings
        )
        refused(InvalidInput, "embeddings must hold real", train, embeddings.astype(kind))
    refused(InvalidInput, "whole numbers, not float", replace(train, labels=train.labels + 0.5), embeddings)
    large = train.features.astype(np.float64)
    refused(InvalidInput, "NaN or infinite", replace(train, features=large * 1e300), embeddings)
    refused(InvalidInput, "would overflow", replace(train, features=large * 1e30), embeddings)
    refused(
        InvalidInput,
        "the same class embedding",
        train,
        np.repeat(embeddings[:1], 12, axis=0) * np.arange(1, 13)[:, None],
    )


def test_bad_scoring_input_is_refused(name: str) -> None:
    model = fitted(name)
    with pytest.raises(ShapeMismatch, match=r"\(n_images, 24\)"):
        model.scores(np.zeros((2, 23), np.float32), DATA.unseen_embeddings)
    with pytest.raises(ShapeMismatch, match=r"\(n_classes, 8\)"):
        model.scores(DATA.unseen.features, DATA.unseen_embeddings[:, :5])
    broken = DATA.unseen.features.copy()
    broken[3, 2] = np.nan
    with pytest.raises(InvalidInput, match="image 3 hold NaN"):
        model.scores(broken, DATA.unseen_embeddings)
    with pytest.raises(InvalidInput, match="zero or not finite"):
        model.scores(DATA.unseen.features, np.full((1, 8), np.inf, np.float32))


def test_one_image_a_class_and_constant_features_still_fit(name: str) -> None:
    keep = np.unique(DATA.train.labels, return_index=True)[1]
    features = DATA.train.features[keep].copy()
    features[:, 0] = 2.0
    train = replace(DATA.train, features=features, labels=DATA.train.labels[keep])
    model = create_classifier(name, brief(name)).fit(train, DATA.seen_embeddings, validation_classes=VALIDATION)
    assert np.isfinite(model.scores(DATA.unseen.features, DATA.unseen_embeddings)).all()


def test_small_integers_as_labels_and_constant_attributes_are_taken(name: str) -> None:
    embeddings = DATA.seen_embeddings.astype(np.float64)
    embeddings[:, 0] = 0.5  # of no use, and no harm
    embeddings[3] = embeddings[2]  # never told apart
    train = replace(DATA.train, labels=DATA.train.labels.astype(np.uint8))
    model = create_classifier(name, brief(name)).fit(train, embeddings * 1e30)
    assert np.isfinite(model.scores(DATA.unseen.features, DATA.unseen_embeddings)).all()


def test_unknown_name_offers_the_nearest(name: str) -> None:
    with pytest.raises(UnknownName, match=name):
        create_classifier(name + "x")
