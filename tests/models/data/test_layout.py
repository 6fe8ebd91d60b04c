from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from models.data.layout import Placement, detect_layout, parse_splits, printable, split_name
from models.errors import InvalidInput


def place(paths: list[str], path: str, splits: Mapping[str, object] | None = None, at: str = "splits.json") -> object:
    data = {} if splits is None else {tuple(at.split("/")): json.dumps(splits).encode()}
    return detect_layout([tuple(p.split("/")) for p in paths], data).place(tuple(path.split("/")))


PLAIN = ["cat/1.jpg", "dog/1.jpg"]


@pytest.mark.parametrize(
    ("top", "split"), [("", None), ("data/", None), ("a/b/", None), ("images/", None), ("data/images/", None)]
)
def test_class_folders_are_found_below_what_all_files_share(top: str, split: None) -> None:
    paths = [top + path for path in PLAIN]
    assert place(paths, top + "cat/1.jpg") == Placement("cat", split)


@pytest.mark.parametrize("top", ["", "data/", "data/images/"])
def test_train_and_test_folders_give_the_split(top: str) -> None:
    paths = [f"{top}train/cat/1.jpg", f"{top}test/cat/2.jpg", f"{top}other/cat/3.jpg"]
    assert place(paths, f"{top}train/cat/1.jpg") == Placement("cat", "train")
    assert place(paths, f"{top}test/cat/2.jpg") == Placement("cat", "test")
    assert "beside train/ and test/" in str(place(paths, f"{top}other/cat/3.jpg"))


def test_only_a_train_folder_is_still_a_split() -> None:
    assert place(["train/cat/1.jpg", "train/dog/1.jpg"], "train/cat/1.jpg") == Placement("cat", "train")


def test_classes_may_be_called_train_or_images() -> None:
    paths = ["train/1.jpg", "images/1.jpg", "bus/1.jpg"]
    assert place(paths, "train/1.jpg") == Placement("train", None)
    assert place(paths, "images/1.jpg") == Placement("images", None)


def test_a_single_class_keeps_its_name() -> None:
    assert place(["cat/1.jpg", "cat/2.jpg"], "cat/1.jpg") == Placement("cat", None)
    assert place(["data/cat/1.jpg"], "data/cat/1.jpg") == Placement("cat", None)


def test_things_beside_images_are_passed_over() -> None:
    paths = ["images/cat/1.jpg", "images/dog/1.jpg", "knowledge/vectors.npz", "README.md"]
    assert place(paths, "knowledge/vectors.npz") is None
    assert place(paths, "README.md") is None
    assert place(paths, "images/.DS_Store") is None
    assert place(paths, "__MACOSX/images/cat/1.jpg") is None


def test_what_fits_no_class_says_why() -> None:
    assert "no class folder" in str(place(PLAIN, "loose.jpg"))
    assert "too deep" in str(place(PLAIN, "cat/more/1.jpg"))
    assert "blank" in str(place(PLAIN, " /1.jpg"))


def test_splits_file_overrides_and_lies_at_the_common_top() -> None:
    splits = {"train": ["images/cat/1.jpg"], "test_seen": ["images/cat/2.jpg"], "test_unseen": ["images/dog/1.jpg"]}
    paths = ["d/images/cat/1.jpg", "d/images/cat/2.jpg", "d/images/dog/1.jpg", "d/images/dog/2.jpg", "d/splits.json"]
    found = [place(paths, path, splits, "d/splits.json") for path in paths]
    cat, dog = "cat", "dog"
    assert found == [
        Placement(cat, "train"),
        Placement(cat, "test"),
        Placement(dog, "test"),
        Placement(dog, None),
        None,
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "JSON object"),
        (b'{"train": "x"}', "'train' must be a list of strings"),
        (b'{"train": [1]}', "'train' must be a list of strings"),
        (b'{"train": ["a/1", "a/1"]}', "'a/1' is listed twice"),
        (b'{"train": ["a/1"], "test_seen": ["a/1"]}', "'a/1' is listed twice"),
        (b'{"seen_classes": ["a"], "unseen_classes": ["a"]}', "both as seen and as unseen"),
        (b'{"seen_classes": ["a"], "validation_classes": ["b"]}', "held out for validation"),
        (b'{"train": ["images/b/1"], "unseen_classes": ["b"]}', "images of 'b' are listed under 'train'"),
    ],
)
def test_damaged_splits_files_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_splits(content)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../cat/1.jpg", r"'\.\.'"),
        ("cat/../../1.jpg", r"'\.\.'"),
        ("cat\\..\\..\\1.jpg", r"'\.\.'"),
        ("/etc/passwd", "absolute"),
        ("\\\\host\\share", "absolute"),
        ("C:/cat/1.jpg", "absolute"),
        ("c:cat/1.jpg", "absolute"),
        ("cat/\x00.jpg", "control"),
        ("cat/a\nb.jpg", "control"),
        ("cat/\udcff.jpg", "Unicode"),
        ("./", "no name"),
        ("x" * 256 + "/1.jpg", "longer than 255"),
    ],
)
def test_hostile_names_are_refused(name: str, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(split_name(name))
    assert printable(name).encode("utf-8")


def test_harmless_names_are_taken_apart() -> None:
    assert split_name("./grizzly bear/ünï.jpg") == ("grizzly bear", "ünï.jpg")
    assert split_name("cat\\1.jpg") == ("cat", "1.jpg")
    assert split_name("x" * 255 + "/1.jpg") == ("x" * 255, "1.jpg")
