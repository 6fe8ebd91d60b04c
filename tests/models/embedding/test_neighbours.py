from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.base import FloatArray, IntArray, Progress
from models.embedding import neighbours as module
from models.embedding.neighbours import NeighbourLists, nearest_neighbours
from models.errors import Cancelled, InvalidInput, TooFewSamples
from tests import reference


def _clustered(rows: int, dim: int, *, offset: float = 0.0, seed: int = 0) -> FloatArray:
    random = np.random.default_rng(seed)
    centres = random.standard_normal((rows // 20, dim))
    points = centres[random.integers(0, len(centres), rows)] + 0.3 * random.standard_normal((rows, dim))
    found: FloatArray = (np.maximum(points, 0) + offset).astype(np.float32)
    return found


def _brute_force(features: FloatArray, k: int) -> IntArray:
    wide = features.astype(np.float64)
    distances = ((wide[:, None, :] - wide[None, :, :]) ** 2).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    return np.argsort(distances, axis=1, kind="stable")[:, :k]


def test_equals_the_plain_rewrite() -> None:
    features = _clustered(40, 3)
    assert nearest_neighbours(features, 5).index.tolist() == reference.nearest_rows(features.tolist(), 5)


@pytest.mark.parametrize("use_bf16", [False, True])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_recall_is_one_against_brute_force_also_far_from_the_origin(
    use_bf16: bool, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PRODUCT_ROWS", 130)
    monkeypatch.setattr(module, "CONVERTED_ROWS", 30)
    features = _clustered(600, 48, offset=offset)
    found = nearest_neighbours(features, 10, use_bf16=use_bf16).index.numpy()
    expected = _brute_force(features, 10)
    shared = [len(set(a) & set(b)) for a, b in zip(found.tolist(), expected.tolist(), strict=True)]
    assert sum(shared) == expected.size


@pytest.mark.parametrize("use_bf16", [False, True])
def test_many_groups_of_columns_with_the_nearest_rows_side_by_side(use_bf16: bool) -> None:
    """Rows lie in the order of their clusters, 40 of them a block's only near ones; several blocks, none full."""
    random = np.random.default_rng(3)
    centres = np.repeat(random.standard_normal((25, 24)), 41, axis=0)
    features = (centres + 0.2 * random.standard_normal(centres.shape)).astype(np.float32)
    found = nearest_neighbours(features, 30, use_bf16=use_bf16).index.numpy()
    expected = _brute_force(features, 30)
    assert (np.sort(found, axis=1) == np.sort(expected, axis=1)).all()
    assert (found == expected).mean() > 0.999  # the order of nearly equal distances is float32's


@pytest.mark.parametrize("use_bf16", [False, True])
def test_equal_distances_are_ordered_by_row(use_bf16: bool) -> None:
    features = np.random.default_rng(0).integers(0, 3, (400, 4)).astype(np.float32)
    found = nearest_neighbours(features, 12, use_bf16=use_bf16).index.numpy()
    distances = ((features[:, None] - features[found]) ** 2).sum(axis=2)
    true = np.sort(((features[:, None] - features[None]) ** 2).sum(axis=2), axis=1)[:, 1:13]
    assert (distances == true).all()
    later = np.diff(distances, axis=1) == 0
    assert later.any()
    assert (np.diff(found, axis=1)[later] > 0).all()


def test_threads_share_the_selection_and_change_nothing() -> None:
    features = _clustered(900, 16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = nearest_neighbours(features, 8).index
        torch.set_num_threads(3)
        together = nearest_neighbours(features, 8).index
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, together)


@pytest.mark.parametrize("use_bf16", [False, True])
def test_numbers_keep_order_value_and_row(use_bf16: bool) -> None:
    dtype = torch.bfloat16 if use_bf16 else torch.float32
    values = torch.tensor([[-3e38, -2.5, -1e-38, 0.0, 1e-38, 0.75, 7.0, torch.finfo(dtype).max, torch.inf]]).to(dtype)
    rows = torch.tensor([[module.ROW_BITS, 5, 2**28, 7, 0, 1, 2, 3, 0]])
    numbered = module._numbered(values, rows)
    assert (numbered.diff() > 0).all()
    found, numbers = module._values_and_rows(numbered)
    assert torch.equal(found, values.float())
    assert torch.equal(numbers, rows)


def test_rows_that_bfloat16_cannot_tell_apart_are_searched_again() -> None:
    """All rows nearly equal, one far off: rounding is far larger than the distances that matter."""
    random = np.random.default_rng(0)
    features = (1 + 1e-2 * random.standard_normal((400, 16))).astype(np.float32)
    features[0] = 1000  # the mean of all rows is far from all of them
    found = nearest_neighbours(features, 5, use_bf16=True).index.numpy()
    wide = features.astype(np.float64)
    distances = np.linalg.norm(wide[:, None] - wide[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    true = np.sort(distances, axis=1)[1:, :5]
    reached = np.take_along_axis(distances, found, axis=1)[1:]
    assert (reached <= true[:, -1:] * 1.001).all()


def test_duplicates_are_neighbours_and_only_the_row_itself_is_left_out() -> None:
    features = np.repeat(_clustered(40, 6)[:10], 3, axis=0)
    index = nearest_neighbours(features, 2).index.tolist()
    for row, found in enumerate(index):
        first = row // 3 * 3
        assert sorted([*found, row]) == [first, first + 1, first + 2]


def test_all_rows_equal_still_gives_other_rows() -> None:
    index = nearest_neighbours(np.ones((50, 4), dtype=np.float32), 7).index.numpy()
    assert (index != np.arange(50)[:, None]).all()
    assert all(len(set(row)) == 7 for row in index.tolist())


def test_count_is_clipped_to_the_other_rows() -> None:
    assert nearest_neighbours(_clustered(40, 3)[:4], 20).index.shape == (4, 3)


def test_a_memory_map_that_may_not_be_held_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = _clustered(300, 12).astype(np.float16)
    np.save(tmp_path / "features.npy", features)
    held = nearest_neighbours(features, 6).index
    monkeypatch.setattr(module, "HELD_BYTES", 0)
    streamed = nearest_neighbours(np.load(tmp_path / "features.npy", mmap_mode="r"), 6).index
    assert torch.equal(held, streamed)


def test_progress_reaches_the_total_and_may_cancel() -> None:
    seen: list[Progress] = []
    nearest_neighbours(_clustered(40, 3), 3, on_progress=seen.append)
    assert (seen[-1].phase, seen[-1].completed, seen[-1].total) == ("neighbours", 40, 40)

    def cancel(progress: Progress) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        nearest_neighbours(_clustered(40, 3), 3, on_progress=cancel)


def test_a_bad_row_is_found_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ORIGIN_ROWS", 10)  # rows 0, 4, 8, … make the origin
    for row in (17, 20):
        features = _clustered(40, 3)
        features[row, 1] = np.inf
        with pytest.raises(InvalidInput, match=f"row {row}"):
            nearest_neighbours(features, 3)
    with pytest.raises(InvalidInput, match="too large"):
        nearest_neighbours(_clustered(40, 3) * np.float32(1e25), 3)


def test_bad_input_says_what_is_wrong() -> None:
    features = _clustered(40, 3)
    features[17, 1] = np.nan
    with pytest.raises(InvalidInput, match="row 17"):
        nearest_neighbours(features, 3)
    with pytest.raises(TooFewSamples, match="at least 2"):
        nearest_neighbours(np.ones((1, 3), dtype=np.float32), 3)
    with pytest.raises(InvalidInput, match="at least 1"):
        nearest_neighbours(np.ones((3, 3), dtype=np.float32), 0)


def test_restricted_lists_keep_order_and_renumber() -> None:
    lists = NeighbourLists(torch.tensor([[1, 2, 3], [0, 3, 2], [3, 0, 1], [1, 0, 2]]), torch.tensor([3, 3, 3, 3]))
    kept = lists.restricted(torch.tensor([0, 2, 3]))
    assert kept.count.tolist() == [2, 2, 2]
    assert [row[:2] for row in kept.index.tolist()] == [[1, 2], [2, 0], [0, 1]]
    lonely = lists.restricted(torch.tensor([1]))
    assert lonely.count.tolist() == [0]
    assert lonely.sample(torch.tensor([0, 0]), torch.Generator().manual_seed(0)).tolist() == [0, 0]


def test_samples_are_uniform_over_the_usable_neighbours() -> None:
    lists = NeighbourLists(torch.tensor([[5, 6, 7, 8], [1, 2, 0, 0]]), torch.tensor([4, 2]))
    drawn = lists.sample(torch.tensor([0, 1] * 4000), torch.Generator().manual_seed(0)).view(-1, 2)
    assert torch.bincount(drawn[:, 0], minlength=9)[5:].div(4000).tolist() == pytest.approx([0.25] * 4, abs=0.03)
    assert torch.bincount(drawn[:, 1])[1:].div(4000).tolist() == pytest.approx([0.5] * 2, abs=0.03)
