from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.lib import format as npy_format
from numpy.typing import NDArray
from scipy.io import loadmat, savemat

from models.data.features import FeatureDataset, fingerprint_splits, load_feature_npz, load_xlsa17
from models.errors import InvalidInput, ShapeMismatch
from tests.shared_data import shared_path

Variables = dict[str, Any]

# Labels 1..5 are b, a, d, e, c: neither sorted nor in the order of allclasses_names.
NAMES = ("b", "a", "d", "e", "c")
LABELS = np.array([1, 1, 2, 2, 3, 3, 4, 4, 5, 5], dtype=np.uint8)


def cells(texts: list[str]) -> NDArray[Any]:
    column = np.empty((len(texts), 1), dtype=object)
    column[:, 0] = texts
    return column


def column(*numbers: int) -> NDArray[np.uint16]:
    return np.array(numbers, dtype=np.uint16)[:, None]


def images() -> Variables:
    files = [f"/data/JPEGImages/{NAMES[label - 1]}/{row}.jpg" for row, label in enumerate(LABELS)]
    return {
        "features": np.arange(30, dtype=np.float64).reshape(3, 10, order="F"),
        "labels": LABELS[:, None],
        "image_files": cells(files),
    }


def splits() -> Variables:
    """Seen: b a d; unseen: e c; d is the validation class of val_loc, which also holds a test_seen row."""
    return {
        "trainval_loc": column(1, 3, 5),
        "test_seen_loc": column(2, 4, 6),
        "test_unseen_loc": column(7, 8, 9, 10),
        "train_loc": column(1, 2, 3, 4),
        "val_loc": column(5, 6),
        "att": np.arange(10, dtype=np.float64).reshape(2, 5),
        "allclasses_names": cells(["a", "b", "c", "d", "e"]),
    }


def pair(tmp_path: Path, images: Variables, splits: Variables) -> tuple[Path, Path]:
    savemat(tmp_path / "res101.mat", images)
    savemat(tmp_path / "att_splits.mat", splits)
    return tmp_path / "res101.mat", tmp_path / "att_splits.mat"


def check_small_set(dataset: FeatureDataset) -> None:
    assert dataset.features.dtype == np.float32
    assert (dataset.features == np.arange(30).reshape(10, 3)).all()
    assert dataset.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert dataset.class_names == NAMES
    assert dataset.seen_classes == ("b", "a", "d")
    assert dataset.unseen_classes == ("e", "c")
    assert dataset.validation_classes == ("d",)
    assert dataset.train_rows.tolist() == [0, 2, 4]
    assert dataset.test_seen_rows.tolist() == [1, 3, 5]
    assert dataset.test_unseen_rows.tolist() == [6, 7, 8, 9]
    assert dataset.class_embeddings is not None
    assert (dataset.class_embeddings == np.arange(10).reshape(2, 5).T).all()
    assert dataset.fingerprint["class_names_from"] == "image_files"


def test_xlsa17_indices_shapes_and_names_come_right(tmp_path: Path) -> None:
    check_small_set(load_xlsa17(*pair(tmp_path, images(), splits())))


def save_hdf5(path: Path, variables: Variables) -> None:
    """As MATLAB -v7.3 does: a 512-byte header, arrays transposed, cells as references to UTF-16 codes."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, value in variables.items():
            if value.dtype != object:
                file[name] = value.T
                continue
            references = np.empty(value.T.shape, dtype=h5py.ref_dtype)
            for i, text in enumerate(value.ravel().tolist()):
                codes = np.frombuffer(text.encode("utf-16-le"), "<u2")[:, None]
                references[0, i] = file.create_dataset(f"#refs#/{name}{i}", data=codes).ref
            file.create_dataset(name, data=references, dtype=h5py.ref_dtype)
    with path.open("r+b") as stream:
        stream.write(b"MATLAB 7.3 MAT-file".ljust(128))


def test_matlab_73_files_give_the_same(tmp_path: Path) -> None:
    save_hdf5(tmp_path / "res101.mat", images())
    save_hdf5(tmp_path / "att_splits.mat", splits())
    check_small_set(load_xlsa17(tmp_path / "res101.mat", tmp_path / "att_splits.mat"))


def test_matlab_73_without_h5py_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_hdf5(tmp_path / "res101.mat", images())
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InvalidInput, match="extra 'hdf5'"):
        load_xlsa17(tmp_path / "res101.mat", tmp_path / "res101.mat")


def test_nested_folders_match_the_listed_names(tmp_path: Path) -> None:
    variables = images() | {
        "image_files": cells(
            [f"/sun/{'abc'[label % 3]}/hall/{'xyzuv'[label - 1]}/{i}.jpg" for i, label in enumerate(LABELS)]
        )
    }
    listed = splits() | {"allclasses_names": cells([f"hall_{c}" for c in "vuzyx"])}
    dataset = load_xlsa17(*pair(tmp_path, variables, listed))
    assert dataset.class_names == ("hall_x", "hall_y", "hall_z", "hall_u", "hall_v")


def test_one_folder_for_all_falls_back_on_the_list_then_on_numbers(tmp_path: Path) -> None:
    variables = images() | {"image_files": cells([f"/jpg/{row}.jpg" for row in range(10)])}
    dataset = load_xlsa17(*pair(tmp_path, variables, splits()))
    assert dataset.class_names == ("a", "b", "c", "d", "e")
    assert dataset.fingerprint["class_names_from"] == "allclasses_names"
    unlisted = {key: value for key, value in splits().items() if key != "allclasses_names"}
    assert load_xlsa17(*pair(tmp_path, variables, unlisted)).class_names[0] == "class_001"


def test_validation_classes_are_chosen_where_the_file_has_none_or_mixes_classes(tmp_path: Path) -> None:
    without = {key: value for key, value in splits().items() if key not in ("train_loc", "val_loc")}
    mixed = splits() | {"val_loc": column(1, 5)}
    for variables in (without, mixed):
        dataset = load_xlsa17(*pair(tmp_path, images(), variables))
        assert len(dataset.validation_classes) == 1
        assert set(dataset.validation_classes) < set(dataset.seen_classes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainval_loc": column(1, 3, 11)}, r"trainval_loc holds 1 row number\(s\) outside 1 to 10, such as 11"),
        ({"trainval_loc": column(0, 3)}, "trainval_loc holds 0; MATLAB indices count from 1"),
        ({"trainval_loc": column(1, 2, 3, 5)}, "1 row.*such as row 1 .*train_rows and test_seen_rows"),
        ({"trainval_loc": column(1, 1, 3)}, "listed more than once"),
        ({"trainval_loc": column(1, 3, 5, 7), "test_unseen_loc": column(8, 9)}, "both as seen and as unseen"),
        ({"trainval_loc": np.array([[1.5]])}, "trainval_loc must hold whole numbers"),
        ({"test_seen_loc": column(2, 7), "test_unseen_loc": column(9, 10)}, "test_seen_rows holds images of 'e'"),
        ({"att": np.array([[np.nan] * 5])}, "class_embeddings holds NaN"),
        ({"att": np.ones((2, 4))}, r"labels of 2 row\(s\)"),
        ({"att": np.ones((2, 7))}, None),
    ],
)
def test_wrong_splits_are_refused(tmp_path: Path, change: Variables, message: str | None) -> None:
    files = pair(tmp_path, images(), splits() | change)
    if message is None:
        assert load_xlsa17(*files).class_names[-1] == "class_007"
        return
    with pytest.raises(InvalidInput, match=message):
        load_xlsa17(*files)


def with_value(value: float, rows: list[int]) -> NDArray[np.float64]:
    features: NDArray[np.float64] = np.ones((3, 10))
    features[1, rows] = value
    return features


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": with_value(np.nan, [2, 7])}, r"NaN or infinite numbers in 2 row\(s\), counted from 0: 2, 7"),
        ({"features": with_value(np.inf, [3])}, r"in 1 row\(s\), counted from 0: 3"),
        ({"features": with_value(1e300, [3])}, r"in 1 row\(s\), counted from 0: 3"),
        ({"features": np.ones((3, 9))}, "features has 9 columns but labels has 10"),
        ({"features": np.ones((0, 10))}, "nothing in it"),
        ({"image_files": cells(["x/y"] * 9)}, "image_files has 9 entries but labels has 10"),
        ({"labels": np.array([["x"]])}, "labels must hold whole numbers"),
        ({"labels": LABELS[:, None] - 1}, "labels holds 0; MATLAB indices count from 1"),
    ],
)
def test_wrong_images_are_refused(tmp_path: Path, change: Variables, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        load_xlsa17(*pair(tmp_path, images() | change, splits()))


def test_swapped_or_foreign_files_are_refused(tmp_path: Path) -> None:
    res101, att_splits = pair(tmp_path, images(), splits())
    with pytest.raises(InvalidInput, match=r"att_splits.mat has no variable 'features'"):
        load_xlsa17(att_splits, res101)
    savemat(res101, {"feature": np.ones((3, 10)), "labels": LABELS})
    with pytest.raises(InvalidInput, match="Did you mean 'feature'"):
        load_xlsa17(res101, att_splits)
    for content in (b"", b"text" * 100, att_splits.read_bytes()[:300], b"MATLAB 7.3 MAT-file".ljust(600)):
        res101.write_bytes(content)
        with pytest.raises(InvalidInput, match=r"res101.mat (is no readable|has no variable)"):
            load_xlsa17(res101, att_splits)


def test_sizes_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    files = pair(tmp_path, images(), splits())
    with pytest.raises(InvalidInput, match="would need"):
        load_xlsa17(*files, max_bytes=300)
    load_xlsa17(*files, max_bytes=1000)


@pytest.mark.parametrize("name", ["AWA1", "AWA2", "SUN"])
def test_real_splits_have_the_published_fingerprints(tmp_path: Path, name: str) -> None:
    real = shared_path("data", "xlsa17", name, "att_splits.mat")
    variables = loadmat(real)
    names = [str(cell[0]) for cell in variables["allclasses_names"].ravel()]
    seen_rows = np.concatenate([variables["trainval_loc"], variables["test_seen_loc"]]).ravel().astype(int) - 1
    val_rows = variables["val_loc"].ravel().astype(int) - 1
    train_rows = variables["train_loc"].ravel().astype(int) - 1
    n_images = len(seen_rows) + len(variables["test_unseen_loc"])
    n_val, n_unseen = {"AWA1": (13, 10), "AWA2": (13, 10), "SUN": (65, 72)}[name]
    labels = np.zeros(n_images, dtype=np.uint16)  # made up, but with the published class sets
    labels[:] = len(names) - n_unseen + np.arange(n_images) % n_unseen
    labels[val_rows] = np.arange(len(val_rows)) % n_val
    n_train = len(names) - n_val - n_unseen
    labels[train_rows] = n_val + np.arange(len(train_rows)) % n_train
    files = [f"/x/{names[label]}/{row}.jpg" for row, label in enumerate(labels)]
    res101 = tmp_path / "res101.mat"
    savemat(res101, {"features": np.ones((1, n_images)), "labels": labels[:, None] + 1, "image_files": cells(files)})
    dataset = load_xlsa17(res101, real)
    assert dataset.fingerprint["release"] == name
    assert len(dataset.seen_classes) == len(names) - n_unseen
    assert len(dataset.unseen_classes) == n_unseen
    assert len(dataset.validation_classes) == n_val
    assert dataset.class_names == tuple(names)
    assert dataset.class_embeddings is not None
    assert np.allclose(np.linalg.norm(dataset.class_embeddings, axis=1), 1, atol=1e-5)


def test_fingerprint_ignores_order_and_notices_a_changed_row() -> None:
    rows = np.array([4, 2, 0])
    assert fingerprint_splits(rows, rows, rows) == fingerprint_splits(rows[::-1], rows, rows)
    assert fingerprint_splits(rows, rows, rows) != fingerprint_splits(rows + 1, rows, rows)
    assert fingerprint_splits(rows, rows, rows)["release"] is None


def arrays() -> Variables:
    return {
        "features": np.arange(12, dtype=np.float16).reshape(6, 2),
        "labels": np.array([0, 0, 1, 1, 2, 2], dtype=np.int16),
        "class_names": np.array(["a", "b", "c"]),
        "train_rows": np.array([0, 2]),
        "test_seen_rows": np.array([1, 3]),
        "test_unseen_rows": np.array([4, 5]),
    }


def npz(tmp_path: Path, variables: Variables) -> Path:
    np.savez(tmp_path / "features.npz", **variables)
    return tmp_path / "features.npz"


def test_npz_with_its_own_rows(tmp_path: Path) -> None:
    dataset = load_feature_npz(
        npz(tmp_path, arrays() | {"class_embeddings": np.eye(3), "class_embedding_names": ["x", "y", "z"]})
    )
    assert dataset.features.dtype == np.float32
    assert (dataset.seen_classes, dataset.unseen_classes) == (("a", "b"), ("c",))
    assert len(dataset.validation_classes) == 1
    assert dataset.train_rows.tolist() == [0, 2]
    assert dataset.class_embedding_names == ("x", "y", "z")


def test_npz_with_names_as_labels(tmp_path: Path) -> None:
    variables = {key: value for key, value in arrays().items() if key != "class_names"}
    variables["labels"] = np.array(["b", "b", "a", "a", "c", "c"])
    dataset = load_feature_npz(npz(tmp_path, variables))
    assert dataset.class_names == ("a", "b", "c")
    assert dataset.labels.tolist() == [1, 1, 0, 0, 2, 2]


def test_npz_with_a_split_beside_it_or_given(tmp_path: Path) -> None:
    variables = {key: value for key, value in arrays().items() if not key.endswith("_rows")}
    path = npz(tmp_path, variables)
    split = {"train": [0, 2], "test_seen": [1], "test_unseen": [4, 5], "validation_classes": ["b"]}
    with pytest.raises(InvalidInput, match=r"there is no splits\.json"):
        load_feature_npz(path)
    (tmp_path / "splits.json").write_text(json.dumps(split))
    (tmp_path / "other.json").write_text(json.dumps(split | {"test_seen": [1, 3], "validation_classes": []}))
    assert load_feature_npz(path).train_rows.tolist() == [0, 2]
    assert load_feature_npz(path).validation_classes == ("b",)
    assert load_feature_npz(path, tmp_path / "other.json").test_seen_rows.tolist() == [1, 3]
    assert load_feature_npz(path, tmp_path / "other.json").validation_classes == ()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": np.zeros(5, int)}, ShapeMismatch, "features has 6 rows but labels has 5"),
        ({"labels": np.array([0, 0, 1, 1, 2, 3])}, InvalidInput, r"labels of 1 row\(s\), such as row 5 \(3\)"),
        ({"labels": np.array([0, 0, 1, 1, 2, -1])}, InvalidInput, r"labels of 1 row\(s\), such as row 5 \(-1\)"),
        ({"labels": np.array([0, 0, 1, 1, 2, np.nan])}, InvalidInput, "labels must hold whole numbers"),
        ({"labels": np.array(list("aabbcd"))}, InvalidInput, "class_names lacks: 'd'"),
        ({"labels": np.array([0, 0, 1, 1, 2, 2_000_000_000]), "class_names": None}, InvalidInput, "2,000,000,001; at"),
        ({"class_names": np.array(["a", "a", "c"])}, InvalidInput, "are the same name"),
        ({"class_names": np.array(["caf\u00e9", "b", "cafe\u0301"])}, InvalidInput, "are the same name"),
        ({"class_names": np.array(["a", "b\x00b", "c"])}, InvalidInput, r"control character U\+0000"),
        ({"train_rows": np.array([0, 6])}, InvalidInput, r"train_rows holds 1 row number\(s\) outside 0 to 5"),
        ({"train_rows": np.array([-1, 0])}, InvalidInput, "such as -1"),
        ({"train_rows": np.array([], dtype=int)}, InvalidInput, "No seen class is left"),
        ({"train_rows": np.array([0, 1])}, InvalidInput, "listed more than once"),
        ({"train_rows": np.array(["a"])}, InvalidInput, "list of row numbers"),
        ({"train_rows": np.array([0, 2, 4]), "test_unseen_rows": np.array([5])}, InvalidInput, "as seen and as unseen"),
        (
            {"train_rows": np.array([0, 2, 4]), "seen_classes": ["a", "b"], "test_unseen_rows": np.array([5])},
            InvalidInput,
            "train_rows holds images of 'c', which are not seen classes",
        ),
        ({"seen_classes": ["a", "b", "z"]}, InvalidInput, "classes that the features do not have: 'z'"),
        ({"validation_classes": ["c"]}, InvalidInput, "held out for validation"),
        ({"features": np.ones(6)}, InvalidInput, "features must be a matrix"),
        ({"features": np.full((6, 2), np.nan)}, InvalidInput, r"in 6 row\(s\), counted from 0: 0, 1, 2"),
        ({"class_embeddings": np.eye(2)}, ShapeMismatch, "2 class embeddings for 3 classes"),
        ({"class_embeddings": np.eye(3), "class_embedding_names": ["x"]}, ShapeMismatch, "1 names for 3 columns"),
    ],
)
def test_wrong_npz_is_refused(tmp_path: Path, change: Variables, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_feature_npz(npz(tmp_path, {k: v for k, v in (arrays() | change).items() if v is not None}))


def test_spaces_around_class_names_go(tmp_path: Path) -> None:
    change = {"labels": np.array(["a ", "a ", "b", "b", "c", "c"]), "class_names": np.array(["a ", "b", "c"])}
    dataset = load_feature_npz(npz(tmp_path, arrays() | change | {"seen_classes": ["a ", "b"]}))
    assert dataset.class_names == ("a", "b", "c")
    assert dataset.seen_classes == ("a", "b")


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    "spoil", [cut, lambda _: b"", lambda _: b"text" * 50, lambda data: data.replace(b"(6,", b"(9,")]
)
def test_damaged_npz_is_refused(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = npz(tmp_path, arrays())
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InvalidInput, match=r"features"):
        load_feature_npz(path)


def test_npz_headers_cannot_take_memory_and_objects_are_not_loaded(tmp_path: Path) -> None:
    path = npz(tmp_path, arrays() | {"bad": np.array([{}], dtype=object)})
    with pytest.raises(InvalidInput, match="Python objects"):
        load_feature_npz(path)
    path = npz(tmp_path, arrays())
    with pytest.raises(InvalidInput, match="would need"):
        load_feature_npz(path, max_bytes=500)


def test_npz_header_that_announces_too_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "features.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("features.npy", "w") as stream:
        npy_format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 10**3)})
    with pytest.raises(
        InvalidInput, match=r"features.npy is cut off: its header announces the shape \(1000000000, 1000\)"
    ):
        load_feature_npz(path)


def test_real_handcrafted_features_load_with_their_split() -> None:
    dataset = load_feature_npz(shared_path("data", "awa1-handcrafted", "features.npz"))
    assert dataset.features.shape == (30_475, 512)
    assert [len(rows) for rows in (dataset.train_rows, dataset.test_seen_rows, dataset.test_unseen_rows)] == [
        19_814,
        4976,
        5685,
    ]
    assert (len(dataset.seen_classes), len(dataset.unseen_classes), len(dataset.validation_classes)) == (40, 10, 10)
    assert "persian+cat" in dataset.class_names
