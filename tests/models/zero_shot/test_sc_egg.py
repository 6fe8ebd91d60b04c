"""SC-EGG's equations against plain rewrites, what learns in which stage, and where it looks."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.base import FloatArray, Progress, ignore_progress
from models.errors import InvalidInput, NotFitted, ShapeMismatch
from models.generative_params import SCEGGParams
from models.zero_shot.gradient import TrainingData
from models.zero_shot.sc_egg import SCEGG
from models.zero_shot.scen import SCEN, consistency_loss, embedding_loss, train_scen
from tests.models.zero_shot.made_up import MadeUp, made_up

SMALL = {
    "epochs": 1, "steps_per_epoch": 2, "batch_size": 16, "hidden_dim": 12, "critic_steps": 1, "embedding_epochs": 2,
    "compression_epochs": 2, "vector_dim": 5, "embedding_learning_rate": 0.01,
}  # fmt: skip
LOCAL, GLOBAL = ("vectors", "attend", "embed"), ("squeeze", "join", "classifier")


def small(**settings: object) -> SCEGGParams:
    return SCEGGParams.model_validate({**SMALL, **settings})


def network(params: SCEGGParams) -> SCEN:
    """4 places of 3 channels, 4 dimensions, 2 classes; attention that differs between places."""
    generator = torch.Generator().manual_seed(0)
    made = SCEN(3, torch.randn(4, 5, generator=generator), 2, params, generator)
    with torch.no_grad():
        made.attend.copy_(torch.randn(5, 3, generator=generator))
    return made


def data(n_rows: int = 20) -> TrainingData:
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.nn.functional.normalize(torch.randn(2, 4, generator=generator), dim=1)
    return TrainingData(torch.rand(n_rows, 12, generator=generator), torch.arange(n_rows) % 2, embeddings, generator)


def plain(net: SCEN, image: list[float], params: SCEGGParams) -> tuple[list[list[float]], ...]:
    """alpha (A x R), h (A x D), and e, g, p_g in a list each, by loops over Eq. 1, 2, 4 and 5."""
    v, w_a, w_b = (np.asarray(part.detach().numpy(), np.float64) for part in (net.vectors, net.attend, net.embed))
    places = [np.array(image[3 * i : 3 * i + 3]) for i in range(4)]
    if params.unit_places:
        places = [place / np.sqrt(sum(place**2)) for place in places]
    alpha, h, e = [], [], []
    for n in range(4):
        weights = [exp(v[n] @ w_a @ place) for place in places]
        alpha.append([weight / sum(weights) for weight in weights])
        h.append(sum(share * place for share, place in zip(alpha[n], places, strict=True)))
        e.append(h[n] @ w_b @ v[n])
    one, two = (
        (np.asarray(layer.weight.detach(), np.float64), np.asarray(layer.bias.detach(), np.float64))
        for layer in (net.squeeze, net.join)
    )
    g = []
    for channel in range(3):
        inner = one[0] @ [h[n][channel] for n in range(4)] + one[1]
        g.append((two[0] @ np.where(inner > 0, inner, 0.01 * inner) + two[1])[0])
    p_g = net.classifier.weight.detach().numpy() @ g + net.classifier.bias.detach().numpy()
    return alpha, [list(row) for row in h], [e], [g], [list(p_g)]


def cross_entropy(scores: list[float], label: int) -> float:
    return log(sum(exp(score) for score in scores)) - scores[label]


@pytest.mark.parametrize("unit_places", [True, False])
def test_equations_are_plain_sums(unit_places: bool) -> None:
    params = small(unit_places=unit_places, global_weight=0.7)
    net, rows = network(params), data(6)
    looked = attention, places = net.look(rows.features)
    parts = attention, attention @ places, net.semantic(*looked)[:, None], net.compress(*looked)[:, None]
    lce = gce = scr = 0.0
    for i, image in enumerate(rows.features.tolist()):
        alpha, h, e, g, p_g = plain(net, image, params)
        for found, wanted in zip(parts, (alpha, h, e, g), strict=True):
            np.testing.assert_allclose(found[i].detach(), wanted, rtol=1e-4, atol=1e-5)
        p_l = [float(np.dot(e[0], phi)) for phi in rows.embeddings.numpy()]
        lce += cross_entropy(p_l, i % 2) / 6
        gce += cross_entropy(p_g[0], i % 2) / 6
        scr += sum((a - b) ** 2 for a, b in zip(p_l, p_g[0], strict=True)) / 6
    given = rows.features, rows.labels, rows.embeddings
    assert embedding_loss(net, params, *given).item() == pytest.approx(lce + 0.7 * gce, rel=1e-4)
    assert consistency_loss(net, params, rows.features, rows.embeddings).item() == pytest.approx(scr, rel=1e-4)
    compat = small(unit_places=unit_places, code_compat=True)
    mean = consistency_loss(net, compat, rows.features, rows.embeddings).item()
    assert mean == pytest.approx(scr / 2, rel=1e-4)


def test_code_s_compression_is_the_mean_and_its_classifier_a_new_one() -> None:
    net = network(small(code_compat=True))
    attention, places = net.look(data().features)
    local = attention @ places
    net.is_averaged = True
    torch.testing.assert_close(net.compress(attention, places), local.mean(dim=1))
    assert net.head is not None
    torch.testing.assert_close(net.classify(local[:, 0]), net.head(local[:, 0]))


def test_guidance_sees_generated_features_on_the_scale_of_g() -> None:
    net, rows = network(small()), data(6)
    compressed = net.compress(*net.look(rows.features)).detach()
    net.fit_scale(compressed)
    scaled = net.scaled(compressed)
    torch.testing.assert_close((scaled.amin(dim=0), scaled.amax(dim=0)), (torch.zeros(3), torch.ones(3)))
    assert (scaled.mean(dim=0) <= 0.5).all()
    net.fit_scale(-compressed)  # the sign of SC is chance, and what the generator sees is not
    torch.testing.assert_close(net.scaled(-compressed), scaled)
    net.fit_scale(compressed)
    scores = net.classify(compressed).tolist()
    wanted = sum(cross_entropy(row, i % 2) for i, row in enumerate(scores)) / 6
    assert net.guidance(scaled, rows.labels).item() == pytest.approx(wanted, rel=1e-4)


def moved(**settings: object) -> set[str]:
    """Which parts of the network stages 1 and 2 change."""
    params = small(**settings)
    net = network(params)
    before = {name: weight.clone() for name, weight in net.named_parameters()}
    train_scen(net, params, data(), ignore_progress)
    assert not any(weight.requires_grad for weight in net.parameters())
    return {name.split(".")[0] for name, weight in net.named_parameters() if not torch.equal(weight, before[name])}


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, {*LOCAL, *GLOBAL}),
        ({"compression_epochs": 0}, {*LOCAL, *GLOBAL}),
        ({"compression_epochs": 0, "global_weight": 0}, set(LOCAL)),
        ({"global_weight": 0}, {*LOCAL, *GLOBAL}),
        ({"local_weight": 0, "global_weight": 0}, set(GLOBAL)),
        ({"local_weight": 0, "compression_epochs": 0}, {"vectors", "attend", *GLOBAL}),
    ],
)
def test_a_loss_that_is_left_out_teaches_nothing(settings: dict[str, object], wanted: set[str]) -> None:
    assert moved(**settings) == wanted


def test_code_s_second_stage_trains_the_new_classifier_alone() -> None:
    assert moved(code_compat=True, local_weight=0, global_weight=0) == {"head"}


def test_local_embedding_is_still_in_stage_2() -> None:
    params = small()
    net, rows = network(params), data()
    consistency_loss(net, params, rows.features, rows.embeddings).backward()  # type: ignore[no-untyped-call]  # torch gives it no types
    assert net.vectors.grad is net.attend.grad is net.embed.grad is None
    assert net.squeeze.weight.grad is not None


def test_attention_finds_planted_attributes_that_a_mean_over_places_drowns() -> None:
    """Of 10 attributes a class shows 3, each at one of 25 places; all else is clutter of the image's own."""
    rng = np.random.default_rng(0)
    n_seen, n_unseen, n_places, channels = 30, 8, 25, 32
    shown = np.array(list(combinations(range(10), 3)))
    shown = shown[rng.choice(len(shown), n_seen + n_unseen, replace=False)]
    embeddings = np.zeros((len(shown), 10), np.float32)
    np.put_along_axis(embeddings, shown, 3**-0.5, axis=1)
    directions = np.linalg.qr(rng.normal(size=(channels, 10)))[0].T
    labels = np.repeat(np.arange(len(shown)), 24)
    maps = rng.normal(size=(len(labels), 1, channels)) + 0.5 * rng.normal(size=(len(labels), n_places, channels))
    maps /= channels**0.5
    where = rng.random((len(labels), n_places)).argsort(axis=1)[:, :3]
    np.put_along_axis(maps, where[:, :, None], directions[shown[labels]], axis=1)
    flat, is_seen = torch.from_numpy(maps.reshape(len(maps), -1).astype(np.float32)), labels < n_seen

    params = SCEGGParams(embedding_epochs=20, compression_epochs=0, vector_dim=32, embedding_learning_rate=0.01)
    generator = torch.Generator().manual_seed(0)
    net = SCEN(channels, torch.randn(10, 32, generator=generator), n_seen, params, generator)
    phi = torch.from_numpy(embeddings)
    rows = TrainingData(flat[is_seen], torch.from_numpy(labels[is_seen]), phi[:n_seen], generator)
    train_scen(net, params, rows, ignore_progress)

    attention, places = net.look(flat[~is_seen])
    of_image, numbers = labels[~is_seen], labels[~is_seen] - n_seen
    found = attention.numpy()[np.arange(len(numbers))[:, None], shown[of_image], where[~is_seen]]
    assert found.mean() > 0.5  # chance: 1 / 25
    scores = net.semantic(attention, places) @ phi[n_seen:].T
    assert (scores.numpy().argmax(axis=1) == numbers).mean() > 0.8  # chance: 1 / 8

    def by_true_means(features: FloatArray) -> float:
        """Accuracy on every other image, by the nearest mean of the rest of a class's images."""
        means = np.stack([features[::2][numbers[::2] == c].mean(axis=0) for c in range(n_unseen)])
        nearest = np.square(features[1::2, None] - means).sum(axis=2).argmin(axis=1)
        return float((nearest == numbers[1::2]).mean())

    assert by_true_means(net.compress(attention, places).numpy()) > 0.8
    assert by_true_means(maps[~is_seen].mean(axis=1)) < 0.4


MADE = made_up()


def fitted(made: MadeUp = MADE, **settings: object) -> SCEGG:
    return SCEGG(small(**settings)).fit(made.train, made.seen_embeddings)


def test_guidance_and_stages_are_phases_of_their_own_and_leave_the_first_network_alone() -> None:
    seen: list[Progress] = []
    model = SCEGG(small()).fit(MADE.train, MADE.seen_embeddings, on_progress=seen.append)
    phases = [progress.phase for progress in seen if progress.phase != "calibrating"]
    assert phases == ["embedding"] * 2 + ["compression"] * 2 + ["training"]
    unguided = fitted(guidance_weight=0)
    for name, weight in model.scen.state_dict().items():
        assert torch.equal(weight, unguided.scen.state_dict()[name])

    def generator(of: SCEGG) -> Tensor:
        return of.network.vae.decoder[0].weight

    assert not torch.equal(generator(model), generator(unguided))


def test_attention_maps_are_shares_ranked_by_what_speaks_for_the_class() -> None:
    made = replace(MADE, train=replace(MADE.train, channels=6))
    model = fitted(made)
    rows, phi = made.train.features[:3], made.seen_embeddings[[0, 1, 2]]
    maps = model.attention(rows, 7 * phi, top=3)
    assert (maps.local.shape, maps.whole.shape, maps.dimensions.shape) == ((3, 3, 2, 2), (3, 2, 2), (3, 3))
    np.testing.assert_allclose(maps.local.sum(axis=(2, 3)), 1, rtol=1e-5)
    np.testing.assert_allclose(maps.whole.sum(axis=(1, 2)), 1, rtol=1e-5)
    attention, places = model.scen.look(torch.from_numpy(rows))
    strengths = model.scen.semantic(attention, places).numpy() * phi / np.linalg.norm(phi, axis=1, keepdims=True)
    assert maps.dimensions[1].tolist() == sorted(range(8), key=lambda n: -strengths[1, n])[:3]
    np.testing.assert_allclose(maps.strengths[1], sorted(strengths[1], reverse=True)[:3], rtol=1e-4)
    np.testing.assert_allclose(maps.local[1, 2].ravel(), attention[1, maps.dimensions[1, 2]], rtol=1e-4)
    assert model.scen.look(torch.zeros(0, 24))[0].shape == (0, 8, 4)
    with pytest.raises(ShapeMismatch, match="as in training"):
        model.attention(rows[:2], phi)
    with pytest.raises(NotFitted):
        SCEGG(small()).attention(rows, phi)
    with pytest.raises(ShapeMismatch, match="2 places are no square"):
        fitted().attention(rows, phi)


def test_given_vectors_are_where_learning_starts() -> None:
    vectors = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    params = small(embedding_epochs=1, embedding_learning_rate=1e-6)
    model = SCEGG(params).fit(MADE.train, MADE.seen_embeddings, dimension_vectors=vectors)
    as_given = SCEGG(params.model_copy(update={"center_vectors": False})).fit(
        MADE.train, MADE.seen_embeddings, dimension_vectors=vectors
    )
    for found, start in ((model, vectors - vectors.mean(axis=0)), (as_given, vectors)):
        unit = start / np.linalg.norm(start, axis=1, keepdims=True)
        np.testing.assert_allclose(found.scen.vectors.numpy(), unit, atol=1e-4)
    alike = SCEGG(params).fit(MADE.train, MADE.seen_embeddings, dimension_vectors=np.ones((8, 4), np.float32))
    np.testing.assert_allclose(alike.scen.vectors.numpy(), 0.5, atol=1e-4)
    for wrong in (vectors[:7], vectors[0], np.full((8, 4), np.nan, np.float32)):
        with pytest.raises(ShapeMismatch, match="dimension_vectors"):
            SCEGG(params).fit(MADE.train, MADE.seen_embeddings, dimension_vectors=wrong)


def test_pooled_features_and_maps_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InvalidInput, match="these features are pooled"):
        SCEGG(small()).fit(replace(MADE.train, channels=None), MADE.seen_embeddings)
    with pytest.raises(ShapeMismatch, match="24 is no multiple of 7"):
        SCEGG(small()).fit(replace(MADE.train, channels=7), MADE.seen_embeddings)


def test_code_s_variant_is_saved_and_loaded(tmp_path: Path) -> None:
    model = fitted(code_compat=True)
    model.save(tmp_path)
    again = SCEGG.load(tmp_path)
    assert again.scen.is_averaged
    given = MADE.unseen.features, MADE.unseen_embeddings
    np.testing.assert_array_equal(model.scores(*given), again.scores(*given))


def test_weight_decay_holds_in_its_first_stages() -> None:

    def size_after(weight_decay: float) -> float:
        params = small(local_weight=1e-30, global_weight=0, compression_epochs=0, weight_decay=weight_decay)
        net = network(params)
        train_scen(net, params, data(), ignore_progress)
        return float(net.embed.detach().norm())

    assert size_after(0.0) == pytest.approx(float(network(small()).embed.detach().norm()), rel=1e-6)
    assert size_after(0.1) < 0.999 * size_after(0.0)
