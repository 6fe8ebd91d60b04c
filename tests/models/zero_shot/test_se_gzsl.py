"""SE-GZSL: the generator's guiding losses, what stays as it is in its stage, and the switches of the paper's tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from models.base import Progress
from models.evaluation import mean_per_class_accuracy
from models.generative_params import SEGZSLParams
from models.zero_shot.gradient import TrainingData
from models.zero_shot.se_gzsl import SEGZSL
from tests.models.zero_shot.made_up import made_up

SMALL = {
    "epochs": 4,
    "steps_per_epoch": 15,
    "learning_rate": 0.005,
    "batch_size": 32,
    "hidden_dim": 48,
    "semantic_dim": 16,
    "decomposition_epochs": 6,
    "decomposition_learning_rate": 0.003,
    "guess_steps": 2,
}
DATA = made_up()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model_of(**more: Any) -> SEGZSL:
    return SEGZSL(SEGZSLParams.model_validate({**SMALL, **more}))


def data() -> TrainingData:
    features, embeddings = torch.rand(24, 6, generator=seeded(1)), torch.randn(3, 4, generator=seeded(2))
    return TrainingData(features, torch.arange(24) % 3, embeddings, seeded(3))


def test_guiding_losses_are_the_plain_sums() -> None:
    model, training, rows = (
        model_of(generator_information_weight=0.2, generator_similarity_weight=0.5),
        data(),
        torch.arange(3, 8),
    )
    model.network = model._make_network(6, 4, seeded())  # type: ignore[assignment]  # its own kind
    fake = torch.rand(5, 6, generator=seeded(4))
    found = model._guidance(fake, training, rows)
    parts = model.network.decomposition
    made, real = (parts.semantic(x).detach().numpy().astype(np.float64) for x in (fake, training.features[rows]))
    labels = training.labels[rows].tolist()
    told = alike = 0.0
    for i in range(5):
        fits = [math.exp(made[i] @ parts.weight.detach().numpy() @ a) for a in training.embeddings.numpy()]
        told += math.log(fits[labels[i]] / (sum(fits) / 3))
        cosines = [math.exp(made[i] @ z / np.linalg.norm(made[i]) / np.linalg.norm(z)) for z in real]
        alike -= math.log(sum(e for e, y in zip(cosines, labels, strict=True) if y == labels[i]) / sum(cosines))
    assert found["loss_mi"].item() == pytest.approx(-0.2 * told / 5, rel=1e-3)
    assert found["loss_sim"].item() == pytest.approx(0.5 * alike / 5, rel=1e-3)


def test_guidance_reaches_generated_features_and_leaves_the_encoders_alone() -> None:
    model, training = model_of(), data()
    model.network = model._make_network(6, 4, seeded())  # type: ignore[assignment]  # its own kind
    fake = torch.rand(5, 6, generator=seeded(4)).requires_grad_()
    loss = torch.stack(list(model._guidance(fake, training, torch.arange(5)).values())).sum()
    loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
    assert fake.grad is not None
    assert bool((fake.grad.abs().sum(dim=1) > 0).all())
    assert all(weight.grad is None for weight in model.network.decomposition.parameters())


def test_encoders_come_first_and_then_stay() -> None:
    model, phases = model_of(), list[str]()
    states: list[torch.Tensor] = []

    def watch(progress: Progress) -> None:
        if progress.phase not in ("decomposition", "training"):  # a trial's
            return
        phases.append(progress.phase)
        encoders = model.network.decomposition
        states.append(torch.cat([w.detach().flatten().clone() for w in encoders.parameters()]))

    model.fit(DATA.train, DATA.seen_embeddings, on_progress=watch)
    assert phases == ["decomposition"] * 6 + ["training"] * 4
    assert not torch.equal(states[0], states[5])
    assert all(torch.equal(state, states[5]) for state in states[6:])


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"representation": "image"},
        {"residual_encoder": False},
        {"use_similarity": False},
        {"normalize": "centered", "final": "softmax"},
    ],
)
def test_unseen_classes_are_recognised_with_each_switch(more: dict[str, Any]) -> None:
    model = model_of(**more).fit(DATA.train, DATA.seen_embeddings)
    scores = model.scores(DATA.unseen.features, DATA.unseen_embeddings)
    assert mean_per_class_accuracy(scores.argmax(axis=1), DATA.unseen.labels, range(4)) > 0.6
    width = 24 if more.get("representation") == "image" else 16
    assert model._represent(torch.rand(3, 24)).shape == (3, width)


def test_without_their_losses_the_encoders_guide_nothing() -> None:
    model, training = model_of(use_information=False, use_similarity=False), data()
    model.network = model._make_network(6, 4, seeded())  # type: ignore[assignment]  # its own kind
    found = model._guidance(torch.rand(5, 6, generator=seeded(4)), training, torch.arange(5))
    assert {name: value.item() for name, value in found.items()} == {"loss_mi": 0, "loss_sim": 0}
