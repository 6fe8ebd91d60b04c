"""What methods that generate features share: critic, final classifiers, synthesis; each method's own equations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.nn import functional

from models.catalog import get_method
from models.errors import InvalidInput
from models.evaluation import mean_per_class_accuracy
from models.generative_params import FCLSWGANParams, FVAEGANParams, GANParams, GenerativeParams
from models.zero_shot.base import create_classifier, load_classifier
from models.zero_shot.checks import match_seen
from models.zero_shot.f_clswgan import FCLSWGAN
from models.zero_shot.f_vaegan import FVAEGAN
from models.zero_shot.final import (
    CACHED_SETS,
    MAX_NEW_CLASSES,
    SHRINKAGES,
    Competing,
    LinearDiscriminants,
    RealRows,
    make_final,
)
from models.zero_shot.generative import Batches, GenerativeModel
from models.zero_shot.vaegan import VAEGAN, kl_divergence, vae_terms
from models.zero_shot.wgan import Adversary, Critic
from tests.models.zero_shot.made_up import made_up

SMALL = {"epochs": 4, "steps_per_epoch": 15, "learning_rate": 0.005, "batch_size": 32, "hidden_dim": 48}
DATA = made_up()
VALIDATION = ("class 1", "class 5", "class 9")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_gradient_penalty_is_that_of_autograd_and_so_is_its_gradient() -> None:
    critic = Critic(6, 3, 10, seeded())
    real, fake, embeddings = (torch.randn(5, width, generator=seeded(width)) for width in (6, 6, 3))
    share = torch.rand(5, 1, generator=seeded(9))
    between = (share * real + (1 - share) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between, embeddings).sum(), between, create_graph=True)
    wanted = (gradient.norm(dim=1) - 1).square().mean()
    distance, found = critic.compare(real, fake, embeddings, seeded(9))
    torch.testing.assert_close(distance, critic(real, embeddings).mean() - critic(fake, embeddings).mean())
    torch.testing.assert_close(found, wanted)
    weights = (critic.hidden.weight, critic.output.weight)
    for ours, theirs in zip(torch.autograd.grad(found, weights), torch.autograd.grad(wanted, weights), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_critic_learns_to_tell_and_judging_leaves_it_alone() -> None:
    adversary = Adversary(GANParams(hidden_dim=32, learning_rate=0.01), 4, 2, 0, "cpu")
    embeddings, chance = torch.zeros(64, 2), seeded()
    distances = []
    for _ in range(100):
        real, fake = torch.randn(64, 4, generator=chance) + 1, torch.randn(64, 4, generator=chance) - 1
        distances.append(float(adversary.learn(real, fake, embeddings, chance)))
    # Means 2 apart in each of 4 dimensions: 4 is the Wasserstein distance.
    assert distances[0] < 0.5
    assert 3 < np.mean(distances[-20:]) < 5
    made = torch.zeros(8, 4, requires_grad=True)
    adversary.judge(made, embeddings[:8]).backward()  # type: ignore[no-untyped-call]  # torch gives it no types
    assert made.grad is not None
    assert made.grad.abs().sum() > 0
    assert all(weight.requires_grad for weight in adversary.critic.parameters())


def rows_of_classes() -> tuple[torch.Tensor, torch.Tensor]:
    """40 rows each of 6 classes, and labels: Gaussians with one uneven covariance."""
    centres = torch.randn(6, 5, generator=seeded(1))
    labels = torch.arange(6).repeat_interleave(40)
    noise = torch.randn(len(labels), 5, generator=seeded(2)) * torch.tensor([1.0, 0.5, 0.5, 0.25, 0.05])
    return centres[labels] + noise, labels


def competing(rows: torch.Tensor, labels: torch.Tensor, n_seen: int, n_classes: int) -> Competing:
    """Classes from `n_seen` on are generated: their own rows."""
    embeddings = np.eye(n_classes, dtype=np.float32)
    seen = np.where(np.arange(n_classes) < n_seen, np.arange(n_classes), -1)
    return Competing(embeddings, seen, lambda classes: torch.stack([rows[labels == int(c)] for c in classes]))


@pytest.mark.parametrize("kind", ["lda", "softmax", "svm", "nearest_mean", "nearest"])
def test_final_classifiers_know_seen_and_generated_classes(kind: str) -> None:
    rows, labels = rows_of_classes()
    params = GenerativeParams.model_validate({"final": kind, "final_epochs": 60, "final_learning_rate": 0.01})
    final = make_final(params, 0)
    is_seen = labels < 4
    final.fit(RealRows(rows[is_seen], labels[is_seen], 4))
    classes = competing(rows, labels, 4, 6)
    scores = final.scores(rows, classes)
    assert mean_per_class_accuracy(scores.argmax(dim=1).numpy(), labels.numpy(), range(6)) > 0.8
    again = make_final(params, 0)
    again.restore(final.state())
    assert torch.equal(again.scores(rows, classes).argmax(dim=1), scores.argmax(dim=1))
    order = np.array([5, 0, 3])
    part = Competing(classes.embeddings[order], classes.seen[order], lambda c: classes.generate(order[c]))
    fewer = final.scores(rows, part)
    assert fewer.shape == (len(rows), 3)
    if not final.is_joint:
        torch.testing.assert_close(fewer, scores[:, order])
    assert bool((fewer[labels == 5].argmax(dim=1) == 0).float().mean() > 0.7)


@pytest.mark.parametrize("kind", ["lda", "softmax"])
def test_what_was_prepared_for_classes_is_never_trained_for_them_again(kind: str) -> None:
    rows, labels = rows_of_classes()
    final = make_final(GenerativeParams.model_validate({"final": kind, "final_epochs": 2}), 0)
    final.fit(RealRows(rows[labels < 4], labels[labels < 4], 4))
    classes = competing(rows, labels, 4, 6)
    prepared, wanted = final.prepared(classes), final.scores(rows, classes)
    for shift in range(1, CACHED_SETS + 2):
        final.scores(rows, replace(classes, embeddings=classes.embeddings + np.float32(shift)))

    def refuse(_: object) -> torch.Tensor:
        pytest.fail("trained again")

    if final.is_joint:
        assert len(final._trained) == CACHED_SETS  # type: ignore[attr-defined]  # those that are joint have it
        classes = replace(classes, generate=refuse)
    assert torch.equal(prepared.scores(rows, classes), wanted)


@pytest.mark.parametrize("final", ["lda", "nearest_mean", "nearest"])
def test_many_new_classes_are_prepared_apart_and_score_the_same(final: str) -> None:
    params = FVAEGANParams.model_validate({**SMALL, "epochs": 1, "final": final, "synthetic_per_class": 4})
    model, fresh = (FVAEGAN(params).fit(DATA.train, DATA.seen_embeddings) for _ in range(2))
    shape = (MAX_NEW_CLASSES + 1, DATA.seen_embeddings.shape[1])
    many = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    assert model.is_ready(many[:-1])
    assert not model.is_ready(many)
    prepared = model.prepared(many)
    assert prepared.is_ready(many)
    features = DATA.unseen.features
    assert np.array_equal(prepared.scores(features, many), fresh.scores(features, many))


@pytest.mark.parametrize(("scale", "kept"), [(1.0, torch.float16), (1e5, torch.float32), (1e-7, torch.float32)])
def test_rows_are_saved_in_float16_where_it_holds_them(scale: float, kept: torch.dtype) -> None:
    rows, labels = rows_of_classes()
    rows = torch.cat([rows * scale, torch.zeros(len(rows), 1)], dim=1)
    final = make_final(GenerativeParams(final="softmax"), 0)
    final.fit(RealRows(rows, labels, 6))
    saved = final.state()["rows"]
    assert saved.dtype == kept
    torch.testing.assert_close(saved.float(), rows, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("kind", ["lda", "softmax", "svm"])
def test_a_generator_that_diverged_is_told(kind: str) -> None:
    rows, labels = rows_of_classes()
    rows[7] = torch.nan
    final = make_final(GenerativeParams.model_validate({"final": kind}), 0)
    with pytest.raises(InvalidInput, match="diverged"):  # noqa: PT012 - some notice in fit, others later
        final.fit(RealRows(rows, labels, 6))
        final.scores(rows, competing(rows, labels, 6, 6))


def test_a_shrinkage_that_leaves_no_inverse_is_told() -> None:
    rows, labels = rows_of_classes()
    final = LinearDiscriminants(GenerativeParams(), 0, shrinkage=0.0)
    with pytest.raises(InvalidInput, match="shrinkage of 0") as told:
        final.fit(RealRows(torch.cat([rows, -rows], dim=1), labels, 6))
    assert told.value.field == "params/shrinkage"


def test_linear_discriminants_are_those_of_scikit_learn() -> None:
    rows, labels = rows_of_classes()
    final = LinearDiscriminants(GenerativeParams(shrinkage=0.3), 0)
    final.fit(RealRows(rows, labels, 6))
    ours = final.scores(rows, competing(rows, labels, 6, 6)).log_softmax(dim=1).numpy()
    means = np.stack([rows[labels == c].numpy().mean(axis=0) for c in range(6)])
    within = rows.numpy() - means[labels.numpy()]
    covariance = within.T @ within / len(rows)
    shrunk = 0.7 * covariance + 0.3 * np.trace(covariance) / 5 * np.eye(5)

    class Shrunk:
        def fit(self, _: object) -> None:
            self.covariance_ = shrunk

    theirs = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=Shrunk()).fit(rows.numpy(), labels.numpy())
    np.testing.assert_allclose(ours, theirs.predict_log_proba(rows.numpy()), atol=1e-3)


def test_shrinkages_are_tried_without_fitting_again() -> None:
    rows, labels = rows_of_classes()
    real, classes = RealRows(rows, labels, 6), competing(rows, labels, 6, 6)
    tried = LinearDiscriminants(GenerativeParams(), 0)
    tried.fit_covariance(real)
    for shrinkage in (0.03, 0.9):
        fitted = LinearDiscriminants(GenerativeParams(), 0, shrinkage)
        fitted.fit(real)
        torch.testing.assert_close(tried.scores_at(rows, classes, shrinkage), fitted.scores(rows, classes))


def test_shrinkage_comes_from_validation_classes_unless_given() -> None:
    params = FCLSWGANParams.model_validate({**SMALL, "synthetic_per_class": 20})
    model = FCLSWGAN(params).fit(DATA.train, DATA.seen_embeddings, validation_classes=VALIDATION)
    chosen = model.validation_["setting"]["shrinkage"]
    assert chosen in SHRINKAGES
    given = FCLSWGANParams.model_validate({**params.model_dump(), "shrinkage": chosen})
    again = FCLSWGAN(given).fit(DATA.train, DATA.seen_embeddings, validation_classes=VALIDATION)
    assert {entry["shrinkage"] for entry in again.history_} == {chosen}


def test_seen_classes_are_known_by_their_vectors() -> None:
    seen = functional.normalize(torch.randn(5, 4, generator=seeded()), dim=1).numpy()
    seen[3] = seen[1]
    scaled = seen[[4, 1, 3]] * np.float32(7.3)
    scaled /= np.linalg.norm(scaled, axis=1, keepdims=True)
    other = seen[:1] + np.float32(1e-3)
    found = match_seen(np.concatenate([scaled, other, seen[:1]]), seen)
    assert found.tolist() == [4, 1, 3, -1, 0]


@pytest.mark.parametrize("kind", ["softmax", "svm", "nearest"])
def test_saved_methods_answer_the_same_with_any_final_classifier(kind: str, tmp_path: Path) -> None:
    params = FVAEGANParams.model_validate({**SMALL, "final": kind, "synthetic_per_class": 20})
    model = FVAEGAN(params).fit(DATA.train, DATA.seen_embeddings, validation_classes=VALIDATION)
    everything = np.concatenate([DATA.seen_embeddings, DATA.unseen_embeddings])
    scores = model.scores(DATA.unseen.features, everything)
    assert mean_per_class_accuracy(scores[:, 12:].argmax(axis=1), DATA.unseen.labels, range(4)) > 0.5
    model.save(tmp_path)
    assert model.is_joint == (kind != "nearest")
    loaded = load_classifier(tmp_path)
    assert isinstance(loaded, FVAEGAN)
    assert np.array_equal(loaded.scores(DATA.unseen.features, everything), scores)
    # Trained weights came along: nothing is trained again for the set that was there.
    assert np.array_equal(loaded.prepared(everything).scores(DATA.unseen.features, everything), scores)
    if model.is_joint:
        np.testing.assert_allclose(
            loaded.scores(DATA.unseen.features, everything[12:]).argmax(axis=1),
            model.scores(DATA.unseen.features, everything[12:]).argmax(axis=1),
        )


def test_generated_features_come_near_the_unseen_classes() -> None:
    """Nearer to the mean of the class they stand for than to any other's, in most cases."""
    model = FVAEGAN(FVAEGANParams.model_validate({**SMALL, "epochs": 8})).fit(DATA.train, DATA.seen_embeddings)
    unit = DATA.unseen_embeddings / np.linalg.norm(DATA.unseen_embeddings, axis=1, keepdims=True)
    scaled = model._scaling(DATA.unseen.features)
    means = np.stack([scaled[DATA.unseen.labels == c].mean(axis=0) for c in range(4)])
    made = [
        model._generate(torch.from_numpy(row).expand(50, -1), seeded()).mean(dim=0).detach().numpy() for row in unit
    ]
    distances = ((np.stack(made)[:, None] - means) ** 2).sum(axis=2)
    assert (distances.argmin(axis=1) == np.arange(4)).sum() >= 3


@pytest.mark.parametrize("is_moved", [True, False])
def test_what_is_generated_for_seen_classes_has_their_mean_on_average(is_moved: bool) -> None:
    params = FCLSWGANParams.model_validate({**SMALL, "epochs": 1, "shift_generated": is_moved})
    model = FCLSWGAN(params).fit(DATA.train, DATA.seen_embeddings)
    scaled = model._scaling(DATA.train.features)
    means = np.stack([scaled[DATA.train.labels == c].mean(axis=0) for c in range(12)])
    unit = DATA.seen_embeddings / np.linalg.norm(DATA.seen_embeddings, axis=1, keepdims=True)
    generated = model._competing(unit).generate(np.arange(12)).mean(dim=1).numpy()
    missed = np.abs((means - generated).mean(axis=0)).max()
    assert missed < 1e-5 if is_moved else missed > 0.05


@pytest.mark.parametrize("is_centred", [True, False])
def test_networks_see_embeddings_about_their_mean(is_centred: bool) -> None:
    params = FCLSWGANParams.model_validate({**SMALL, "epochs": 1, "center_embeddings": is_centred})
    model = FCLSWGAN(params).fit(DATA.train, DATA.seen_embeddings)
    unit = DATA.seen_embeddings / np.linalg.norm(DATA.seen_embeddings, axis=1, keepdims=True)
    seen = model._conditions(unit.astype(np.float32)).numpy()
    assert np.mean(np.sum(seen**2, axis=1)) == pytest.approx(1, abs=1e-4)
    if is_centred:
        np.testing.assert_allclose(seen.mean(axis=0), 0, atol=1e-6)
        # All by the same amount and the same factor: directions between classes stay.
        np.testing.assert_allclose(
            (seen[1] - seen[0]) / (unit[1] - unit[0]), seen[3, 0] / (unit - unit.mean(0))[3, 0], rtol=1e-2
        )
    else:
        np.testing.assert_allclose(seen, unit, atol=1e-6)


def test_loss_of_the_vae_is_the_plain_sum() -> None:
    network = VAEGAN(6, 3, 2, 8, seeded())
    real, embeddings = torch.rand(4, 6, generator=seeded(1)), torch.randn(4, 3, generator=seeded(2))
    mean, log_variance = network.encode(real, embeddings)
    noise = torch.randn(4, 2, generator=seeded(5))
    rebuilt = network(mean + torch.exp(log_variance / 2) * noise, embeddings)
    total = 0.0
    for i in range(4):
        for x, p in zip(real[i].tolist(), rebuilt[i].tolist(), strict=True):
            total -= x * np.log(p) + (1 - x) * np.log(1 - p)
        for m, v in zip(mean[i].tolist(), log_variance[i].tolist(), strict=True):
            total += 0.5 * (m * m + np.exp(v) - v - 1)
    assert vae_terms(network, real, embeddings, seeded(5)).item() == pytest.approx(total / 4, rel=1e-4)
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (log_variance / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    ).sum(dim=1)
    torch.testing.assert_close(kl_divergence(mean, log_variance), wanted)


def test_batches_take_every_row_once_a_pass() -> None:
    steps = Batches(10, 4, seeded())
    first, second = (torch.cat([next(steps) for _ in range(3)]) for _ in range(2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()
    assert len(next(steps)) == 4
    chance, state = steps._generator.get_state(), steps.state_dict()
    rest = [next(steps).tolist() for _ in range(5)]
    again = Batches(10, 4, seeded(7))
    again._generator.set_state(chance)
    again.load_state_dict(state)
    assert [next(again).tolist() for _ in range(5)] == rest


def test_width_of_the_noise_is_that_of_the_embedding_unless_given() -> None:
    for given, wanted in ((None, 8), (3, 3)):
        params = FCLSWGANParams.model_validate({**SMALL, "epochs": 1, "noise_dim": given})
        model = FCLSWGAN(params).fit(DATA.train, DATA.seen_embeddings)
        assert model.network.state_dict()["0.weight"].shape == (48, wanted + 8)


@pytest.mark.parametrize(
    ("method", "if_signed"), [("f_clswgan", "zscore"), ("se_gzsl", "zscore"), ("cada_vae", "centered")]
)
def test_scaling_is_settled_by_whether_features_can_be_negative(method: str, if_signed: str, tmp_path: Path) -> None:
    schema = get_method(method, "classifier").params
    few = {"epochs": 1, "steps_per_epoch": 1, "hidden_dim": 8, "folds": 1, "decomposition_epochs": 1}
    params = schema.model_validate({name: value for name, value in few.items() if name in schema.model_fields})
    assert DATA.train.features.min() == 0
    for offset, wanted in ((0, "minmax"), (1, if_signed)):
        rows = replace(DATA.train, features=DATA.train.features - offset)
        model = create_classifier(method, params).fit(rows, DATA.seen_embeddings, validation_classes=VALIDATION)
        model.save(tmp_path / wanted)
        loaded = load_classifier(tmp_path / wanted)
        asked = params.model_copy(update={"normalize": wanted})
        assert model.params == loaded.params == asked
        same = create_classifier(method, asked).fit(rows, DATA.seen_embeddings, validation_classes=VALIDATION)
        found = [each.scores(rows.features, DATA.seen_embeddings) for each in (model, loaded, same)]
        assert np.array_equal(found[0], found[1])
        assert np.array_equal(found[0], found[2])
        told = create_classifier(method, params).assess(rows, DATA.seen_embeddings, validation_classes=VALIDATION)
        assert told["t1"] == model.validation_["t1"]


@pytest.mark.parametrize("method", ["f_clswgan", "se_gzsl"])
def test_features_that_are_not_scaled_are_negative_where_training_features_are(method: str, tmp_path: Path) -> None:
    schema = get_method(method, "classifier").params
    few = {"epochs": 1, "steps_per_epoch": 1, "hidden_dim": 8, "folds": 1, "decomposition_epochs": 1}
    params = schema.model_validate(
        {"normalize": "none", **{name: value for name, value in few.items() if name in schema.model_fields}}
    )
    for offset, is_signed in ((0, False), (3, True)):
        rows = replace(DATA.train, features=DATA.train.features - offset)
        model = create_classifier(method, params).fit(rows, DATA.seen_embeddings, validation_classes=VALIDATION)
        assert isinstance(model, GenerativeModel)
        conditions = torch.from_numpy(DATA.unseen_embeddings)
        assert bool((model._generate(conditions, seeded()) < 0).any()) == is_signed
        model.save(tmp_path)
        scores = model.scores(rows.features, DATA.seen_embeddings)
        assert np.array_equal(load_classifier(tmp_path).scores(rows.features, DATA.seen_embeddings), scores)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["is_signed"]  # a file of before: its generator ended in a ReLU
        save_file(weights, tmp_path / "model.safetensors")
        older = load_classifier(tmp_path)
        assert isinstance(older, GenerativeModel)
        assert not (older._generate(conditions, seeded()) < 0).any()


def test_scaling_is_settled_at_each_fit() -> None:
    model = FCLSWGAN(FCLSWGANParams(epochs=1, steps_per_epoch=1, hidden_dim=8))
    for offset, wanted in ((0, "minmax"), (1, "zscore"), (0, "minmax")):
        model.fit(replace(DATA.train, features=DATA.train.features - offset), DATA.seen_embeddings)
        assert model.params.normalize == wanted


def test_shrinkage_leaves_a_covariance_that_can_be_inverted() -> None:
    with pytest.raises(ValidationError):
        FCLSWGANParams(shrinkage=0.99e-4)
    least = FCLSWGANParams(epochs=1, steps_per_epoch=1, hidden_dim=8, shrinkage=1e-4)
    wide = np.maximum(np.random.default_rng(0).normal(size=(180, 600)), 0).astype(np.float32)
    model = FCLSWGAN(least).fit(replace(DATA.train, features=wide), DATA.seen_embeddings)
    assert np.isfinite(model.scores(wide[:2], DATA.unseen_embeddings)).all()
