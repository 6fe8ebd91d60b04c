from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from models.data.folders import scan_folder
from models.data.images import probe_image
from models.errors import InvalidInput
from tests.shared_data import shared_path


def fill(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_images_come_sorted_with_class_and_path(tmp_path: Path) -> None:
    fill(tmp_path, "dog/2.jpg", "cat/b.png", "cat/a.JPG", "cat/.hidden", ".git/x/y", "cat/Thumbs.db")
    scan = scan_folder(tmp_path)
    assert [(image.name, image.class_name, image.split) for image in scan.images] == [
        ("cat/a.JPG", "cat", None),
        ("cat/b.png", "cat", None),
        ("dog/2.jpg", "dog", None),
    ]
    assert scan.images[0].path == tmp_path / "cat" / "a.JPG"
    assert scan.class_names == ("cat", "dog")
    assert scan.rejected == ()
    assert scan.seen_classes is None


def test_splits_file_gives_splits_and_classes_and_reports_what_is_missing(tmp_path: Path) -> None:
    fill(tmp_path, "images/cat/1.jpg", "images/cat/2.jpg", "images/dog/1.jpg", "knowledge/x.npz")
    splits = {
        "train": ["images/cat/1.jpg", "images/cat/gone.jpg"],
        "test_seen": ["images/cat/2.jpg"],
        "test_unseen": ["images/dog/1.jpg"],
        "seen_classes": ["cat"],
        "unseen_classes": ["dog"],
        "validation_classes": [],
    }
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    scan = scan_folder(tmp_path)
    assert [image.split for image in scan.images] == ["train", "test", "test"]
    assert (scan.seen_classes, scan.unseen_classes, scan.validation_classes) == (("cat",), ("dog",), ())
    assert [name for name, _ in scan.rejected] == ["images/cat/gone.jpg"]


def test_train_and_test_folders(tmp_path: Path) -> None:
    fill(tmp_path, "train/cat/1.jpg", "test/cat/1.jpg", "notes.txt")
    scan = scan_folder(tmp_path)
    assert [image.split for image in scan.images] == ["test", "train"]
    assert [name for name, _ in scan.rejected] == ["notes.txt"]


def test_links_are_followed_only_inside(tmp_path: Path) -> None:
    root = tmp_path / "root"
    fill(tmp_path, "secret/1.jpg")
    fill(root, "cat/1.jpg")
    (root / "cat" / "inside.jpg").symlink_to(root / "cat" / "1.jpg")
    (root / "cat" / "outside.jpg").symlink_to(tmp_path / "secret" / "1.jpg")
    (root / "cat" / "broken.jpg").symlink_to(root / "nothing")
    (root / "stolen").symlink_to(tmp_path / "secret", target_is_directory=True)
    (root / "ring").symlink_to(root, target_is_directory=True)
    scan = scan_folder(root)
    assert [image.name for image in scan.images] == ["cat/1.jpg", "cat/inside.jpg"]
    reasons = dict(scan.rejected)
    assert "leads out" in reasons["cat/outside.jpg"]
    assert "broken" in reasons["cat/broken.jpg"]
    assert "link to a folder" in reasons["stolen"]
    assert "link to a folder" in reasons["ring"]


def test_a_pipe_is_rejected_without_being_opened(tmp_path: Path) -> None:
    fill(tmp_path, "cat/1.jpg")
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    assert [name for name, _ in scan_folder(tmp_path).rejected] == ["cat/pipe.jpg"]


def test_names_that_are_no_unicode_are_rejected(tmp_path: Path) -> None:
    fill(tmp_path, "cat/1.jpg")
    try:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/cat/\xff.jpg"))).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    ((name, reason),) = scan_folder(tmp_path).rejected
    assert name == "cat/?.jpg"
    assert "Unicode" in reason


@pytest.mark.parametrize("names", [(), ("loose.jpg",), (".hidden/1.jpg",)])
def test_nothing_to_use_is_an_error(tmp_path: Path, names: tuple[str, ...]) -> None:
    fill(tmp_path, *names)
    with pytest.raises(InvalidInput, match="no files in class folders"):
        scan_folder(tmp_path)


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is not a folder"):
        scan_folder(tmp_path / "nowhere")


def test_real_animals_have_their_split() -> None:
    scan = scan_folder(shared_path("data", "animals"))
    assert Counter(image.split for image in scan.images) == {"train": 801, "test": 558}
    assert len(scan.class_names) == 19
    assert scan.seen_classes is not None
    assert scan.unseen_classes is not None
    assert set(scan.class_names) == {*scan.seen_classes, *scan.unseen_classes}
    assert scan.validation_classes == ("cow", "leopard", "rabbit")
    assert scan.rejected == ()
    assert probe_image(scan.images[0].path.read_bytes()).format == "JPEG"
