"""TF-VAEGAN's equations against plain rewrites, and what its switches do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from models.generative_params import TFVAEGANParams
from models.zero_shot.feedback import FeedbackVAEGAN, reconstruction_loss, synthesise, train_with_feedback
from models.zero_shot.gradient import TrainingData
from models.zero_shot.tf_vaegan import TFVAEGAN
from tests.models.zero_shot.made_up import made_up

SMALL = {"epochs": 2, "steps_per_epoch": 4, "batch_size": 16, "hidden_dim": 12, "critic_steps": 2}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> FeedbackVAEGAN:
    return FeedbackVAEGAN(6, 3, 2, 8, seeded())


def data() -> TrainingData:
    chance = seeded(3)
    labels = torch.arange(4).repeat(10)
    embeddings = functional.normalize(torch.randn(4, 3, generator=chance), dim=1)
    return TrainingData(torch.rand(40, 6, generator=chance), labels, embeddings, chance)


def lrelu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def test_features_are_made_in_two_passes() -> None:
    net = network()
    noise, embeddings = torch.randn(5, 2, generator=seeded(1)), torch.randn(5, 3, generator=seeded(2))
    first, last = net.vae.decoder[0], net.vae.decoder[2]
    before = lrelu(torch.cat([noise, embeddings], dim=1) @ first.weight.T + first.bias)
    plain = torch.sigmoid(before @ last.weight.T + last.bias)
    torch.testing.assert_close(net.make(noise, embeddings, 0.0), plain)
    torch.testing.assert_close(net.vae(noise, embeddings), plain)
    hidden = lrelu(plain @ net.semantic.first.weight.T + net.semantic.first.bias)
    one, two = net.feedback[0], net.feedback[2]
    fed_back = lrelu(lrelu(hidden @ one.weight.T + one.bias) @ two.weight.T + two.bias)
    wanted = torch.sigmoid((before + 0.3 * fed_back) @ last.weight.T + last.bias)
    torch.testing.assert_close(net.make(noise, embeddings, 0.3), wanted)


def test_enhanced_features_are_feature_embedding_and_hidden_units() -> None:
    net = network()
    features = torch.rand(4, 6, generator=seeded(1))
    hidden = lrelu(features @ net.semantic.first.weight.T + net.semantic.first.bias)
    decoded = hidden @ net.semantic.last.weight.T + net.semantic.last.bias
    wanted = torch.cat([features, decoded / decoded.norm(dim=1, keepdim=True), 0.3 * hidden], dim=1)
    torch.testing.assert_close(net.enhance(features, 0.3), wanted)


def test_reconstruction_losses_are_plain_sums() -> None:
    found, right = torch.randn(4, 3, generator=seeded(1)), torch.randn(4, 3, generator=seeded(2))
    errors = (found - right).numpy().astype(np.float64)
    by_code = [sum(abs(e) ** 3 for e in row) / np.sqrt(sum(e * e for e in row)) for row in errors]
    assert reconstruction_loss(found, right, "l1").item() == pytest.approx(np.abs(errors).sum() / 4, rel=1e-5)
    assert reconstruction_loss(found, right, "code").item() == pytest.approx(np.mean(by_code), rel=1e-5)
    equal = right.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reconstruction_loss(equal, right, "code"), equal)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize(
    ("switches", "still"),
    [({}, ()), ({"feedback_weight": 0.0}, ("feedback",)), ({"train_decoder_on_fake": False}, ())],
)
def test_every_part_learns_unless_switched_off(switches: dict[str, object], still: tuple[str, ...]) -> None:
    net = network()
    before = {name: weight.clone() for name, weight in net.named_parameters()}
    params = TFVAEGANParams.model_validate({**SMALL, "hidden_dim": 8, "noise_dim": 2, **switches})
    losses = next(train_with_feedback(net, params, data(), 0))
    assert set(losses) == {"loss", "vae_loss", "decoded", "distance"}
    for name, weight in net.named_parameters():
        assert torch.equal(weight, before[name]) == name.startswith(still), name
        assert weight.requires_grad


def test_decoder_learns_from_real_features_alone_when_asked() -> None:

    def decoder_after(**switches: object) -> Tensor:
        net = network()
        params = TFVAEGANParams.model_validate({**SMALL, "hidden_dim": 8, "noise_dim": 2, **switches})
        next(train_with_feedback(net, params, data(), 0))
        return net.semantic.last.weight.detach()

    assert not torch.equal(decoder_after(train_decoder_on_fake=True), decoder_after(train_decoder_on_fake=False))
    # The generator's losses do not reach a decoder that only real features teach.
    assert torch.equal(
        decoder_after(train_decoder_on_fake=False, gan_weight=1.0),
        decoder_after(train_decoder_on_fake=False, gan_weight=30.0),
    )


def test_what_a_method_adds_to_the_loss_is_minimised() -> None:
    net, training = network(), data()
    params = TFVAEGANParams.model_validate({**SMALL, "hidden_dim": 8, "noise_dim": 2, "learning_rate": 0.01})

    def bright(fake: Tensor, labels: Tensor) -> Tensor:
        assert len(fake) == len(labels)
        return -1000 * fake.mean()

    epochs = train_with_feedback(net, params, training, 0, bright)
    for _ in range(10):
        next(epochs)
    assert net.make(torch.randn(20, 2, generator=seeded(1)), training.embeddings[:1].expand(20, -1), 1.0).mean() > 0.9


def test_final_classifier_sees_enhanced_features_only_if_asked() -> None:
    made = made_up()
    for enhanced, width in ((True, 24 + 8 + 12), (False, 24)):
        params = TFVAEGANParams.model_validate({**SMALL, "enhanced": enhanced})
        model = TFVAEGAN(params).fit(made.train, made.seen_embeddings)
        assert model._state()["final/means"].shape == (12, width)


def test_feedback_that_was_not_trained_does_not_synthesise() -> None:
    net, embeddings = network(), data().embeddings
    without, told = (
        synthesise(net, TFVAEGANParams(feedback_weight=weight, synthesis_feedback_weight=1), embeddings, seeded(1))
        for weight in (0.0, 0.5)
    )
    noise = torch.randn(4, 2, generator=seeded(1))
    assert torch.equal(without, net.make(noise, embeddings, 0.0))
    assert torch.equal(told, net.make(noise, embeddings, 1.0))


@pytest.mark.parametrize(("n_steps", "without"), [(1, 0), (2, 1), (5, 2)])
def test_an_epoch_has_its_steps_of_which_half_are_without_feedback(n_steps: int, without: int) -> None:
    net, steps = network(), 0
    in_feedback: list[int] = []
    net.feedback.register_forward_hook(lambda *_: in_feedback.append(steps))

    def count(fake: Tensor, labels: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        return fake.new_zeros(())

    params = TFVAEGANParams.model_validate({**SMALL, "hidden_dim": 8, "noise_dim": 2, "steps_per_epoch": n_steps})
    next(train_with_feedback(net, params, data(), 0, count))
    assert steps == n_steps
    assert in_feedback[0] == without


def test_weight_decay_is_the_feedback_modules_too() -> None:

    def size_after(weight_decay: float) -> float:
        net = network()
        # Feedback that weighs next to nothing teaches nothing: only decay moves it.
        few = {**SMALL, "hidden_dim": 8, "noise_dim": 2, "feedback_weight": 1e-30, "weight_decay": weight_decay}
        next(train_with_feedback(net, TFVAEGANParams.model_validate(few), data(), 0))
        return float(net.feedback[0].weight.detach().norm())

    assert size_after(0.0) == pytest.approx(float(network().feedback[0].weight.detach().norm()), rel=1e-6)
    assert size_after(0.1) < 0.999 * size_after(0.0)
