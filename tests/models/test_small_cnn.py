from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from models.base import Progress
from models.errors import Cancelled, ShapeMismatch, TooFewSamples
from models.params import ScratchParams
from models.small_cnn import FEATURE_DIM, SmallCNN, augment, normalise, train_small_cnn

SHORT = ScratchParams(epochs=2, batch_size=8)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def coloured_images(n: int, seed: int = 0, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Noise round one colour a class: three classes that colour tells apart."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])
    pixels = colours[labels][:, :, None, None] + rng.normal(0, 25, (n, 3, side, side))
    return pixels.clip(0, 255).astype(np.uint8), labels


def test_features_are_the_mean_of_the_map() -> None:
    model = SmallCNN().eval()
    x = torch.rand(2, 3, 50, 64)
    assert model.spatial(x).shape == (2, FEATURE_DIM, 4, 4)
    torch.testing.assert_close(model(x), model.spatial(x).mean(dim=(2, 3)))


def test_it_learns_to_tell_new_images_apart() -> None:
    images, labels = coloured_images(60)
    model = train_small_cnn(images, labels, ScratchParams(epochs=6, batch_size=12))
    assert not model.training
    with torch.no_grad():
        new_images, new_labels = coloured_images(30, seed=1)
        means = torch.stack([model(normalise(torch.tensor(images[labels == c]))).mean(0) for c in range(3)])
        features = model(normalise(torch.tensor(new_images)))
    nearest = torch.cdist(features, means).argmin(1).numpy()
    assert (nearest == new_labels).mean() > 0.9


def test_the_same_seed_gives_the_same_weights_bit_for_bit_and_another_seed_others() -> None:
    images, labels = coloured_images(16)
    first, again, other = (
        torch.cat([p.detach().flatten() for p in train_small_cnn(images, labels, SHORT, seed=seed).parameters()])
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_global_random_state_is_left_alone() -> None:
    images, labels = coloured_images(8)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_small_cnn(images, labels, SHORT)
    assert torch.equal(torch.rand(3), expected)


def test_a_source_of_images_gives_the_same_as_the_array() -> None:
    images, labels = coloured_images(16)
    from_array = train_small_cnn(images, labels, SHORT)
    from_source = train_small_cnn(lambda rows: torch.tensor(images[rows]), labels, SHORT)
    for a, b in zip(from_array.parameters(), from_source.parameters(), strict=True):
        assert torch.equal(a, b)


def test_progress_counts_steps_and_may_cancel() -> None:
    images, labels = coloured_images(20)
    reports: list[Progress] = []
    train_small_cnn(images, labels, SHORT, on_progress=reports.append)
    assert [(r.completed, r.total) for r in reports] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert set(reports[0].metrics) == {"loss", "accuracy"}

    def cancel(progress: Progress) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        train_small_cnn(images, labels, SHORT, on_progress=cancel)


def test_augmentation_keeps_shape_and_range_and_follows_its_generator() -> None:
    images = torch.tensor(coloured_images(6)[0])
    one, two, three = (augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert one.shape == images.shape
    assert one.min() >= -2
    assert one.max() <= 2
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


@pytest.mark.parametrize(
    ("images", "labels", "error"),
    [
        (np.zeros((4, 3, 8, 8), np.uint8), np.zeros(3, int), ShapeMismatch),
        (np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, int), ShapeMismatch),
        (np.zeros((4, 3, 8, 8), np.float32), np.zeros(4, int), ShapeMismatch),
        (np.zeros((1, 3, 8, 8), np.uint8), np.zeros(1, int), TooFewSamples),
        (np.zeros((2, 3, 8, 8), np.uint8), np.array([0, -1]), ValueError),
    ],
)
def test_bad_input_is_refused(images: np.ndarray, labels: np.ndarray, error: type[Exception]) -> None:
    with pytest.raises(error):
        train_small_cnn(images, labels, SHORT)
