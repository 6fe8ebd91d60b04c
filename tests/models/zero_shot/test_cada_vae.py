"""CADA-VAE: each term of the loss against a plain rewrite, the ramps, and latents in place of features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from models.evaluation import mean_per_class_accuracy
from models.generative_params import CADAVAEParams
from models.zero_shot.cada_vae import (
    CADAVAE,
    AlignedVAEs,
    LossWeights,
    distribution_distance,
    loss_terms,
    ramp,
    sample,
)
from models.zero_shot.folds import Rows
from tests.models.zero_shot.made_up import made_up

SMALL = {"epochs": 6, "steps_per_epoch": 20, "learning_rate": 0.005, "batch_size": 32, "hidden_dim": 48}
DATA = made_up()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fitted(**more: Any) -> CADAVAE:
    params = CADAVAEParams.model_validate({**SMALL, **more})
    return CADAVAE(params).fit(DATA.train, DATA.seen_embeddings)


@pytest.mark.parametrize("code_compat", [False, True])
def test_terms_of_the_loss_are_the_plain_sums(code_compat: bool) -> None:
    network = AlignedVAEs(5, 3, 2, (4, 6, 7, 8), seeded())
    features, embeddings = torch.rand(4, 5, generator=seeded(1)), torch.randn(4, 3, generator=seeded(2))
    found = loss_terms(network, features, embeddings, seeded(3), code_compat=code_compat)
    chance, latents, gaussians = seeded(3), [], []
    for encoder, inputs in ((network.feature_encoder, features), (network.embedding_encoder, embeddings)):
        out = encoder(inputs).detach().numpy().astype(np.float64)
        mean, log_variance = out[:, :2], out[:, 2:]
        noise = torch.randn(4, 1 if code_compat else 2, generator=chance).numpy()
        latents.append(mean + np.exp(log_variance if code_compat else log_variance / 2) * noise)
        gaussians.append((mean, log_variance))
    decoders, wanted = (network.feature_decoder, network.embedding_decoder), (features, embeddings)
    total = dict.fromkeys(("rebuilt", "crossed", "divergence", "distance"), 0.0)
    for i in range(4):
        for own in (0, 1):
            for name, source in (("rebuilt", own), ("crossed", 1 - own)):
                made = decoders[own](torch.from_numpy(latents[source][i]).float()).detach()
                total[name] += sum(abs(float(a) - float(b)) for a, b in zip(made, wanted[own][i], strict=True))
            for m, v in zip(gaussians[own][0][i], gaussians[own][1][i], strict=True):
                total["divergence"] -= 0.5 * (1 + v - m**2 - np.exp(v))
        (mean, v), (other_mean, other_v) = gaussians
        apart = ((mean[i] - other_mean[i]) ** 2).sum() + ((np.exp(v[i] / 2) - np.exp(other_v[i] / 2)) ** 2).sum()
        total["distance"] += float(np.sqrt(apart))
    for name, value in total.items():
        assert found[name].item() == pytest.approx(value / 4, rel=1e-4), name


def test_equal_gaussians_have_no_distance_and_a_gradient() -> None:
    mean = torch.randn(3, 2, generator=seeded(), requires_grad=True)
    gaussian = (mean, torch.zeros(3, 2))
    distance = distribution_distance(gaussian, (mean.detach(), torch.zeros(3, 2))).sum()
    distance.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
    assert distance.item() < 1e-4
    assert mean.grad is not None
    assert bool(torch.isfinite(mean.grad).all())


def test_training_does_not_stop_while_alignment_is_still_being_brought_in() -> None:
    # A step size of nearly 0: no epoch is better than the first, and patience alone would end it after the second.
    params = CADAVAEParams.model_validate({**SMALL, "epochs": 10, "learning_rate": 1e-12, "patience": 1, "folds": 1})
    lengths = {}
    for ramp_end in (0.1, 0.75):
        asked = params.model_copy(update={"cross_ramp": (0.0, ramp_end), "align_ramp": (0.0, 0.1)})
        model = CADAVAE(asked).fit(DATA.train, DATA.seen_embeddings, validation_classes=DATA.train.class_names[:3])
        lengths[ramp_end] = len(model.history_)
    assert lengths[0.1] < 8
    assert lengths[0.75] == 8


def test_draws_have_the_deviation_that_is_asked_for() -> None:
    mean, log_variance = torch.zeros(4000, 3), torch.full((4000, 3), -2.0)
    drawn = sample((mean, log_variance), seeded())
    as_in_code = sample((mean, log_variance), seeded(), code_compat=True)
    assert drawn.std().item() == pytest.approx(np.exp(-1), rel=0.05)
    assert as_in_code.std().item() == pytest.approx(np.exp(-2), rel=0.05)
    assert bool((as_in_code == as_in_code[:, :1]).all())  # one number a row
    assert not bool((drawn == drawn[:, :1]).all())


def test_weights_grow_along_their_ramps() -> None:
    assert [ramp(share, (0.25, 0.75)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0, 0, 0.5, 1, 1]
    assert [ramp(share, (0.5, 0.5)) for share in (0.4, 0.5)] == [0, 1]
    # The authors' code: (epoch - start) / (end - start) of the factor, in 100 epochs.
    params = CADAVAEParams()
    for epoch in (0, 6, 14, 22, 48, 75, 99):
        at = LossWeights.at(epoch / 100, params)
        wanted = [
            min(max((epoch - start) / (end - start), 0), 1) * factor
            for start, end, factor in ((0, 93, 0.25), (21, 75, 2.37), (6, 22, 8.13))
        ]
        assert [at.divergence, at.crossed, at.distance] == pytest.approx(wanted)
    terms = {"rebuilt": 1.0, "divergence": 10.0, "crossed": 100.0, "distance": 1000.0}
    total = LossWeights(2, 3, 4).total({name: torch.tensor(value) for name, value in terms.items()})
    assert total.item() == 1 + 20 + 300 + 4000


def test_classes_are_drawn_in_the_latent_space_and_images_are_means() -> None:
    model = fitted(latent_dim=5, code_compat=False)
    features = torch.from_numpy(model._scaling(DATA.unseen.features))
    embeddings = torch.from_numpy(DATA.unseen_embeddings)
    assert model._represent(features).shape == (60, 5)
    torch.testing.assert_close(model._represent(features), model.network.encode_features(features)[0])
    rows = model._rows_of_classes(embeddings[:1].expand(2000, -1), seeded())
    mean, log_variance = model.network.encode_embeddings(embeddings[:1])
    torch.testing.assert_close(rows.mean(dim=0), mean[0], atol=0.1, rtol=0.05)
    torch.testing.assert_close(rows.std(dim=0), (log_variance[0] / 2).exp(), atol=0.05, rtol=0.1)
    assert model._generate(embeddings, seeded()).shape == (4, 24)


def test_seen_classes_may_have_as_many_latents_each() -> None:
    uneven = np.concatenate([np.flatnonzero(DATA.train.labels == c)[: 3 + c] for c in range(12)])
    model = fitted(latent_dim=5, seen_per_class=7)
    train = Rows(
        model._scaling(DATA.train.features)[uneven], DATA.train.labels[uneven], np.eye(12, 8, dtype=np.float32)
    )
    real = model._real(train)
    assert torch.bincount(real.labels).tolist() == [7] * 12
    # Unless asked for, as many as there are images.
    model.params = model.params.model_copy(update={"seen_per_class": None})
    assert torch.bincount(model._real(train).labels).tolist() == [3 + c for c in range(12)]
    first = real.rows[real.labels == 0]  # 3 images: drawn again and again
    assert len(torch.unique(first, dim=0)) == 7
    means = model._represent(torch.from_numpy(train.features[:3]))
    assert bool(((first[:3] - means).norm(dim=1) > 0).all())


@pytest.mark.parametrize(
    "more",
    [
        {"hidden_dims": [20, 21, 22, 23], "seen_per_class": 20},
        {"code_compat": False, "kl_weight": 0.05, "align_weight": 1.0},
    ],
)
def test_switches_still_learn(more: dict[str, object]) -> None:
    model = fitted(**more)
    if "hidden_dims" in more:
        widths = [weight.shape[0] for name, weight in model.network.state_dict().items() if name.endswith("0.weight")]
        assert widths == [20, 21, 22, 23]
    scores = model.scores(DATA.unseen.features, DATA.unseen_embeddings)
    assert mean_per_class_accuracy(scores.argmax(axis=1), DATA.unseen.labels, range(4)) > 0.6
