from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.color import rgb2gray
from skimage.filters import sobel
from skimage.segmentation import watershed

from models.embedding.patches import cut_patches, label_boxes, patch_boxes, segment
from models.errors import ShapeMismatch
from models.params import PatchParams
from tests.shared_data import shared_path

METHODS = ("watershed", "grid", "whole")


def blobs(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth random picture: something for the watershed to follow."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))


def slow_boxes(labels: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Boxes by looking at every pixel."""
    boxes: dict[int, list[int]] = {}
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            left, top, right, bottom = boxes.get(labels[y, x], [x, y, x + 1, y + 1])
            boxes[labels[y, x]] = [min(left, x), min(top, y), max(right, x + 1), max(bottom, y + 1)]
    return [tuple(boxes[label]) for label in sorted(boxes)]  # type: ignore[misc]  # four numbers each


def assert_usable(boxes: np.ndarray, height: int, width: int) -> None:
    assert len(boxes) >= 1
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes[:, 2] <= width).all()
    assert (boxes[:, 3] <= height).all()


def test_boxes_are_those_of_a_plain_rewrite() -> None:
    image = blobs(60, 80)
    labels = watershed(sobel(rgb2gray(image)), markers=9, compactness=1e-3)
    assert patch_boxes(image).tolist() == [list(box) for box in slow_boxes(labels)]


def test_labels_that_do_not_occur_have_no_box() -> None:
    labels = np.array([[1, 1, 4], [4, 4, 4]], dtype=np.int32)
    assert label_boxes(labels).tolist() == [[0, 0, 2, 1], [0, 0, 3, 2]]


def test_about_nine_boxes_cover_the_image() -> None:
    for height, width in ((120, 120), (100, 150), (150, 100), (90, 200)):
        image = blobs(height, width)
        boxes = patch_boxes(image)
        assert 6 <= len(boxes) <= 12
        covered = np.zeros((height, width), bool)
        for left, top, right, bottom in boxes:
            covered[top:bottom, left:right] = True
        assert covered.all()


def test_a_large_image_has_the_scaled_boxes_of_its_working_copy() -> None:
    image = blobs(512, 768)
    copy = np.asarray(Image.fromarray(image).resize((384, 256), Image.Resampling.BILINEAR))
    expected = label_boxes(segment(copy, 9, 1e-3)) * 2
    assert patch_boxes(image).tolist() == expected.tolist()


def test_compactness_turns_segments_into_the_regular_grid() -> None:
    image = blobs(90, 90)
    sides = (
        patch_boxes(image, PatchParams(compactness=1.0))[:, 2:]
        - patch_boxes(image, PatchParams(compactness=1.0))[:, :2]
    )
    assert (np.abs(sides - 30) <= 8).all()
    irregular = patch_boxes(image)
    assert np.ptp(irregular[:, 2] - irregular[:, 0]) > 16


def test_the_grid_is_three_by_three_and_tiles_the_image() -> None:
    boxes = patch_boxes(blobs(91, 200), PatchParams(method="grid"))
    assert len(boxes) == 9
    assert ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum() == 91 * 200
    assert len(patch_boxes(blobs(60, 90), PatchParams(method="grid", n_patches=8))) == 8


def test_whole_is_one_box() -> None:
    assert patch_boxes(blobs(20, 30), PatchParams(method="whole")).tolist() == [[0, 0, 30, 20]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_patches", [1, 2, 9, 128])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 400), (400, 1), (2, 2), (3, 700), (300, 7), (64, 64)])
def test_degenerate_images_have_usable_boxes(method: Any, n_patches: int, shape: tuple[int, int]) -> None:
    params = PatchParams(method=method, n_patches=n_patches)
    for image in (np.full((*shape, 3), 128, np.uint8), blobs(*shape)):
        boxes = patch_boxes(image, params)
        assert_usable(boxes, *shape)
        assert boxes.tolist() == patch_boxes(image.copy(), params).tolist()
        assert cut_patches(image, boxes, 16).shape == (len(boxes), 3, 16, 16)


@pytest.mark.parametrize("image", [np.zeros((8, 8), np.uint8), np.zeros((0, 8, 3), np.uint8), np.zeros((8, 8, 3))])
def test_what_is_no_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ShapeMismatch, match="uint8 of shape"):
        patch_boxes(image)


def test_patches_are_the_resized_pixels() -> None:
    image = blobs(70, 90)
    boxes = np.array([[10, 5, 60, 45], [0, 0, 90, 70]], dtype=np.int32)
    patches = cut_patches(image, boxes, 24)
    assert patches.dtype == torch.uint8
    for patch, (left, top, right, bottom) in zip(patches, boxes, strict=True):
        crop = Image.fromarray(image[top:bottom, left:right]).resize((24, 24), Image.Resampling.BILINEAR)
        difference = patch.permute(1, 2, 0).numpy().astype(int) - np.asarray(crop).astype(int)
        assert np.abs(difference).max() <= 2


def test_a_read_only_image_can_be_cut_and_is_not_changed() -> None:
    image = blobs(20, 20)
    before = image.copy()
    image.flags.writeable = False
    cut_patches(image, patch_boxes(image), 16)
    assert (image == before).all()


def test_photos_give_about_nine_patches_of_a_sensible_size() -> None:
    folder = shared_path("data", "animals", "images")
    counts, areas = [], []
    for path in sorted(folder.glob("*/*.jpg"))[::150]:
        image = np.array(Image.open(path).convert("RGB"))
        boxes = patch_boxes(image)
        assert_usable(boxes, *image.shape[:2])
        counts.append(len(boxes))
        areas.extend(((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) / (image.shape[0] * image.shape[1])).tolist())
    assert 8 <= np.mean(counts) <= 10
    assert 0.1 < np.mean(areas) < 0.35
