"""Features taken apart: each loss against plain loops, what has a gradient, and a set with a known answer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from models.base import FloatArray, IntArray, Progress
from models.generative_params import SEGZSLParams
from models.zero_shot.decomposition import (
    Decomposer,
    Decomposition,
    Guess,
    balanced_batches,
    club,
    decompose,
    info_nce,
    similarity_loss,
)
from models.zero_shot.gradient import TrainingData

LABELS = torch.tensor([0, 2, 1, 0, 2])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def data(n: int = 24, n_classes: int = 3) -> TrainingData:
    return TrainingData(random(n, 6, seed=1), torch.arange(n) % n_classes, random(n_classes, 4, seed=2), seeded(3))


def parts(**more: Any) -> Decomposer:
    params = SEGZSLParams.model_validate({"hidden_dim": 8, "semantic_dim": 5, "batch_size": 12, **more})
    return Decomposer(params, Decomposition(params, 6, 4, seeded()), data(), 0)


def test_info_nce_is_the_plain_sum() -> None:
    semantic, weight, embeddings = random(5, 3, seed=1), random(3, 4, seed=2), random(3, 4, seed=3)
    total = 0.0
    for z, y in zip(semantic.numpy(), LABELS.tolist(), strict=True):
        fits = [math.exp(z @ weight.numpy() @ a) for a in embeddings.numpy()]
        total += math.log(fits[y] / (sum(fits) / 3))
    assert info_nce(semantic, weight, LABELS, embeddings).item() == pytest.approx(total / 5, rel=1e-4)


def test_club_is_the_plain_double_loop() -> None:
    residual, embeddings = random(5, 3, seed=1), random(3, 4, seed=2)
    guess = Guess(3, 7, embeddings, seeded())
    scaled = (embeddings - embeddings.mean(dim=0)) / embeddings.sub(embeddings.mean(dim=0)).square().mean().sqrt()
    total = 0.0
    for z, y in zip(residual, LABELS.tolist(), strict=True):
        mean, log_variance = guess.network(z).detach().chunk(2)
        density = torch.distributions.Normal(mean, (log_variance.tanh() / 2).exp())
        likelihoods = [float(density.log_prob(a).sum()) for a in scaled]  # type: ignore[no-untyped-call]  # torch gives it no types
        total += likelihoods[y] - sum(likelihoods) / 3
    assert club(guess, residual, LABELS, embeddings).item() == pytest.approx(total / 5, rel=1e-4)


def test_similarity_is_the_plain_sum_of_all_pairs() -> None:
    semantic = random(5, 3, seed=1)
    rows = semantic.numpy() / np.linalg.norm(semantic.numpy(), axis=1, keepdims=True)
    total = 0.0
    for i in range(5):
        near = [math.exp(rows[i] @ rows[j]) for j in range(5)]
        total -= math.log(sum(e for e, y in zip(near, LABELS, strict=True) if y == LABELS[i]) / sum(near))
    assert similarity_loss(semantic, LABELS, semantic, LABELS).item() == pytest.approx(total / 5, rel=1e-4)


def test_with_one_image_a_class_an_image_is_like_itself_alone() -> None:
    semantic, labels = torch.eye(4, requires_grad=True), torch.arange(4)
    loss = similarity_loss(semantic, labels, semantic, labels)
    assert loss.item() == pytest.approx(math.log((math.e + 3) / math.e), rel=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
    assert semantic.grad is not None
    assert bool(torch.isfinite(semantic.grad).all())
    assert similarity_loss(semantic[:1], labels[:1], semantic[:1], labels[:1]).item() == pytest.approx(0, abs=1e-6)


def test_total_is_the_weighted_sum_of_its_terms() -> None:
    decomposer = parts(similarity_weight=3)
    found = decomposer.terms(torch.arange(12))
    features, network = decomposer.data.features[:12], decomposer.network
    assert network.residual is not None
    rebuilt = network.decoder(torch.cat([network.semantic(features), network.residual(features)], dim=1))
    torch.testing.assert_close(found["rebuilt"], ((features - rebuilt) ** 2).sum(dim=1).mean())
    wanted = found["rebuilt"] - 20 * found["information"] + 50 * found["leaked"] + 3 * found["similarity"]
    torch.testing.assert_close(found["loss"], wanted)


@pytest.mark.parametrize(
    ("switch", "left"),
    [
        ({"use_information": False}, {"rebuilt", "similarity"}),
        ({"use_similarity": False}, {"rebuilt", "information", "leaked"}),
        ({"residual_encoder": False}, {"rebuilt", "information", "similarity"}),
        ({"use_information": False, "use_similarity": False}, {"rebuilt"}),
    ],
)
def test_switches_leave_terms_out(switch: dict[str, bool], left: set[str]) -> None:
    assert set(parts(**switch).terms(torch.arange(12))) == {"loss", *left}


def test_the_guess_and_the_encoders_learn_in_turns() -> None:
    decomposer = parts()
    rows = torch.arange(12)

    def state(network: torch.nn.Module) -> torch.Tensor:
        return torch.cat([weight.detach().flatten().clone() for weight in network.parameters()])

    network, guess = state(decomposer.network), state(decomposer.guess)
    decomposer.learn_guess(rows)
    assert torch.equal(state(decomposer.network), network)
    assert not torch.equal(state(decomposer.guess), guess)
    guess = state(decomposer.guess)
    decomposer.learn(rows)
    assert torch.equal(state(decomposer.guess), guess)
    assert not torch.equal(state(decomposer.network), network)
    # q is left out of the gradients, but lets those of z_r through.
    decomposer.guess.zero_grad()
    decomposer.network.zero_grad()
    decomposer.terms(rows)["leaked"].backward()  # type: ignore[no-untyped-call]  # torch gives it no types
    assert all(weight.grad is None for weight in decomposer.guess.parameters())
    assert decomposer.network.residual is not None
    assert all(weight.grad is not None for weight in decomposer.network.residual.parameters())
    assert all(weight.requires_grad for weight in decomposer.guess.parameters())


def test_batches_hold_a_few_images_of_a_few_classes() -> None:
    labels = torch.tensor([0] * 9 + [1] * 2 + [2] + [3] * 9 + [4] * 9)
    steps = balanced_batches(labels, 12, 4, seeded())
    counts = torch.zeros(5)
    for _ in range(200):
        rows = next(steps)
        assert len(set(rows.tolist())) == len(rows)
        found = torch.bincount(labels[rows], minlength=5)
        assert bool(((found == 0) | (found == torch.tensor([4, 2, 1, 4, 4]))).all())
        assert int((found > 0).sum()) == 3
        counts += found > 0
    assert bool(((counts > 90) & (counts < 150)).all())  # each class in 3 of 5 steps


def test_progress_is_a_phase_of_its_own() -> None:
    decomposer = parts(decomposition_epochs=3, steps_per_epoch=2)
    reports: list[Progress] = []
    decompose(decomposer.params, decomposer.network, decomposer.data, 0, reports.append)
    assert [(p.phase, p.completed, p.total) for p in reports] == [("decomposition", i, 3) for i in (1, 2, 3)]
    assert {"loss", "rebuilt", "information", "leaked", "similarity", "likelihood"} <= set(reports[0].metrics)


# -- a known answer: features are linear in embeddings and in nuisance -----------------------------------------------


class Known:
    """20 classes x 20 images: 4 numbers of the class and 4 of the image alone, mixed to 24 features, and new images."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        embeddings = rng.normal(size=(20, 4))
        self.embeddings = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float32)
        self.labels = np.repeat(np.arange(20), 20)
        mixing = rng.normal(size=(8, 24)) * np.repeat([2, 0.5], 4)[:, None]
        self.nuisance = rng.normal(size=(2, 400, 4))
        told = np.broadcast_to(self.embeddings[self.labels], (2, 400, 4))
        features = np.concatenate([told, self.nuisance], axis=2) @ mixing + 0.05 * rng.normal(size=(2, 400, 24))
        self.features = (features / features[0].std(axis=0)).astype(np.float32)

    def training(self) -> TrainingData:
        features, labels, embeddings = map(torch.from_numpy, (self.features[0], self.labels, self.embeddings))
        return TrainingData(features, labels, embeddings, seeded(1))

    def probes(self, rows: FloatArray) -> tuple[float, float]:
        """R^2 on new images of linear probes of nuisance and embeddings from `rows` (2, 400, R)."""
        return probe(rows, self.nuisance), probe(rows, np.stack([self.embeddings[self.labels]] * 2))


def probe(rows: FloatArray, wanted: FloatArray) -> float:
    """R^2 on the second half of a ridge regression learned from the first."""
    rows = np.concatenate([rows, np.ones((*rows.shape[:2], 1))], axis=2).astype(np.float64)
    gram = rows[0].T @ rows[0]
    weight = np.linalg.solve(gram + 1e-3 * gram.trace() / len(gram) * np.eye(len(gram)), rows[0].T @ wanted[0])
    spread = ((wanted[1] - wanted[1].mean(axis=0)) ** 2).sum()
    return float(1 - ((rows[1] @ weight - wanted[1]) ** 2).sum() / spread)


KNOWN = Known()


def taken_apart(**more: Any) -> tuple[FloatArray, FloatArray | None]:
    """z_s and z_r of both halves."""
    small = {"hidden_dim": 48, "semantic_dim": 16, "batch_size": 64, "steps_per_epoch": 30, "decomposition_epochs": 8}
    # L_sim is what takes nuisance out of z_s; at its weight in the paper, 1, a linear probe still finds it there.
    losses = {"similarity_weight": 100, "leak_weight": 5, "decomposition_learning_rate": 0.003}
    params = SEGZSLParams.model_validate({**small, **losses, **more})
    network = Decomposition(params, 24, 4, seeded())
    decompose(params, network, KNOWN.training(), 0, lambda _: None)
    features = torch.from_numpy(KNOWN.features)
    with torch.no_grad():
        residual = None if network.residual is None else network.residual(features).numpy()
        return network.semantic(features).numpy(), residual


def test_the_semantic_encoder_drops_nuisance_and_keeps_what_embeddings_tell() -> None:
    nuisance, told = KNOWN.probes(KNOWN.features)
    assert nuisance > 0.95
    assert told > 0.95
    semantic, residual = taken_apart()
    assert residual is not None
    nuisance, told = KNOWN.probes(semantic)
    assert nuisance < 0.4
    assert told > 0.95
    left_over, leaked = KNOWN.probes(residual)
    assert left_over > 0.8
    assert leaked < 0.9
    # CLUB keeps what embeddings tell out of z_r; it is not what takes nuisance out of z_s.
    semantic, residual = taken_apart(leak_weight=0)
    assert residual is not None
    assert KNOWN.probes(residual)[1] > leaked + 0.05
    assert KNOWN.probes(semantic)[0] < 0.4


def test_without_a_residual_encoder_nuisance_stays() -> None:
    """The decoder then has nowhere else to find it."""
    nuisance, told = KNOWN.probes(taken_apart(residual_encoder=False)[0])
    assert nuisance > 0.5
    assert told > 0.95


def test_the_papers_weight_of_similarity_leaves_nuisance_to_a_linear_probe() -> None:
    """What is measured, not what the paper claims: little of z_s varies within a class, yet a probe finds it."""
    semantic = taken_apart(similarity_weight=1)[0]
    assert KNOWN.probes(semantic)[0] > 0.5
    assert within_share(semantic[1], KNOWN.labels) < 0.2 * within_share(KNOWN.features[1], KNOWN.labels)


def within_share(rows: FloatArray, labels: IntArray) -> float:
    """Share of the rows' variance that lies within classes."""
    means = np.stack([rows[labels == c].mean(axis=0) for c in range(20)])[labels]
    return float(((rows - means) ** 2).sum() / ((rows - rows.mean(axis=0)) ** 2).sum())
