"""Mixed precision: asked for, training still learns; by default a CPU computes the bits it always did."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from models.base import FloatArray
from models.catalog import METHODS
from models.evaluation import zsl_report
from models.params import Params
from models.precision import full_precision, mixed
from models.zero_shot.base import ZeroShotModel, create_classifier
from models.zero_shot.decomposition import similarity_loss
from models.zero_shot.gradient import BatchModel
from models.zero_shot.layers import linear
from models.zero_shot.vaegan import missed
from models.zero_shot.wgan import Critic, descend
from tests.models.test_contract import brief, quick
from tests.models.zero_shot.made_up import made_up

DATA = made_up()
METHODS_WITH_STEPS = [m.name for m in METHODS if m.kind == "classifier" and "precision" in m.params.model_fields]
CPU = torch.device("cpu")


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fit(name: str, params: Params, **changes: Any) -> tuple[ZeroShotModel, FloatArray]:
    model = create_classifier(name, params.model_copy(update=changes)).fit(DATA.train, DATA.seen_embeddings)
    return model, model.scores(DATA.unseen.features, DATA.unseen_embeddings)


@pytest.mark.parametrize("name", METHODS_WITH_STEPS)
def test_every_trained_method_takes_it_and_learns(name: str) -> None:
    model, scores = fit(name, quick(name), precision="bf16", epochs=min(8, getattr(quick(name), "epochs", 8)))
    assert zsl_report(scores, DATA.unseen.labels, list(DATA.unseen.class_names)).t1 > 0.5  # by chance: 0.25
    assert all(array.dtype in (np.float16, np.float32, np.int64) for array in model._state().values())


@pytest.mark.parametrize("name", ["sje", "se_gzsl"])
def test_by_default_a_cpu_computes_in_float32(name: str) -> None:
    full, half, auto = (fit(name, brief(name), precision=precision)[1] for precision in ("fp32", "bf16", "auto"))
    assert np.array_equal(full, auto)  # to the bit
    assert not np.array_equal(full, half)


def test_layers_multiply_in_bfloat16_and_answer_in_float32() -> None:
    layer, rows = linear(64, 8, chance()), torch.randn(16, 64, generator=chance(1))
    plain = layer(rows)
    with mixed("bf16", "cpu"):
        found = layer(rows)
        with full_precision(CPU):
            assert torch.equal(layer(rows), plain)
    assert found.dtype == torch.float32
    assert torch.equal(found.bfloat16().float(), found)
    torch.testing.assert_close(found, plain, atol=2e-2, rtol=2e-2)
    with mixed("auto", "cpu"), mixed("fp32", "cpu"):
        assert torch.equal(layer(rows), plain)


def test_weights_are_read_anew_at_each_step() -> None:
    layer, rows = linear(8, 1, chance()), torch.ones(4, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with mixed("bf16", "cpu"):
        before = layer(rows).mean().item()
        descend(optimizer, layer(rows).mean())
        assert layer(rows).mean().item() == pytest.approx(before - 0.9, abs=0.02)  # 8 weights and the bias, 0.1 each


def test_penalty_and_losses_stay_in_float32() -> None:
    real, fake = (torch.rand(6, 12, generator=chance(seed)) for seed in (1, 2))
    embeddings, labels = torch.rand(6, 3, generator=chance(3)), torch.arange(6) % 3

    def losses() -> list[torch.Tensor]:
        critic = Critic(12, 3, 16, chance())
        penalty = critic.compare(real, fake, embeddings, chance(4))[1]
        critic.zero_grad()
        descend(torch.optim.SGD(critic.parameters(), lr=1.0), penalty)
        return [
            penalty.detach(),
            *(weight.detach() for weight in critic.parameters()),
            missed(fake, real),
            similarity_loss(real, labels, fake, labels),
        ]

    plain = losses()
    with mixed("bf16", "cpu"):
        found = losses()
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))


@pytest.mark.parametrize("name", ["sje", "ale", "devise", "latem"])
def test_scores_enter_the_losses_in_float32(name: str) -> None:
    model = create_classifier(name)
    assert isinstance(model, BatchModel)
    model.network = model._make_network(12, 3, chance())
    rows, embeddings = torch.rand(6, 12, generator=chance(1)), torch.rand(5, 3, generator=chance(2))
    with mixed("bf16", "cpu"):
        scores = model._score(rows, embeddings)
        loss = model._loss(rows, torch.arange(6) % 5, embeddings)
    assert scores.dtype == loss.dtype == torch.float32
