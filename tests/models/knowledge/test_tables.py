from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy.io import savemat

from models.errors import InvalidInput, MissingKnowledge, ShapeMismatch
from models.knowledge.base import require
from models.knowledge.table_files import from_csv, from_mapping, from_mat, from_npz, read_class_table
from models.knowledge.tables import MAX_DIM, ClassTable, attribute_groups, class_table
from tests.models.knowledge.files import write
from tests.shared_data import shared_path

NAMES = ["persian+cat", "Grizzly_Bear", "003.Sooty_Albatross"]
VECTORS = np.array([[1.0, 0.5], [0.0, 2.0], [-1.0, 3.0]])


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def cells(names: list[str]) -> np.ndarray[Any, Any]:
    """MATLAB cell array of strings, as xlsa17 stores names."""
    array = np.empty((len(names), 1), object)
    array[:, 0] = names
    return array


def test_lookup_matches_names_however_they_are_spelled() -> None:
    table = class_table("class_vectors", NAMES, VECTORS)
    lookup = table.lookup(["persian+cat", "PERSIAN+CAT", "persian cat", "grizzly-bear", "sooty albatross"])
    np.testing.assert_array_equal(require(lookup), VECTORS[[0, 0, 0, 1, 2]].astype(np.float32))
    assert [r.how for r in lookup.resolutions] == [
        "exact",
        "case-folded",
        "spelled persian+cat",
        "spelled Grizzly_Bear",
        "spelled 003.Sooty_Albatross",
    ]


def test_class_numbers_are_ignored_only_where_that_is_unambiguous() -> None:
    table = class_table("class_vectors", ["1.cat", "2.cat", "7.dog"], np.eye(3))
    lookup = table.lookup(["cat", "dog", "2.cat", "9.dog"])
    assert [r.found for r in lookup.resolutions] == [False, True, True, True]


def test_missing_classes_are_told_with_suggestions() -> None:
    table = class_table("class_vectors", NAMES, VECTORS)
    lookup = table.lookup(["grizly bear", "brown bear", "truck"])
    assert [r.suggestions for r in lookup.resolutions] == [("Grizzly_Bear",), ("Grizzly_Bear",), ()]
    assert not lookup.vectors.any()
    with pytest.raises(MissingKnowledge, match=r"'grizly bear' .near: 'Grizzly_Bear'."):
        require(lookup)


def test_suggestions_are_found_in_a_large_table_too() -> None:
    names = [f"species {i}" for i in range(5000)]
    table = class_table("class_vectors", [*names, "zebra"], np.ones((5001, 1)))
    assert table.lookup(["zebr"]).resolutions[0].suggestions == ("zebra",)
    assert len(table.lookup([f"spezies {i}" for i in range(60)]).missing) == 60


def test_npz_keys_are_read_with_their_attributes(tmp_path: Path) -> None:
    words = np.ones((2, 5), np.float16)
    path = npz(
        tmp_path / "a.npz", class_names=NAMES, vectors=VECTORS, attribute_names=["big", "fast"], attribute_vectors=words
    )
    table = read_class_table(path, "attributes")
    assert (table.kind, table.class_names, table.attribute_names) == ("attributes", tuple(NAMES), ("big", "fast"))
    np.testing.assert_array_equal(table.vectors, VECTORS.astype(np.float32))
    assert table.attribute_vectors is not None
    assert (table.attribute_vectors.shape, table.attribute_vectors.dtype) == ((2, 5), np.dtype(np.float32))


def test_npz_in_the_manner_of_xlsa17_is_transposed(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", allclasses_names=NAMES, att=np.asfortranarray(VECTORS.T))
    np.testing.assert_array_equal(from_npz(path).vectors, VECTORS.astype(np.float32))
    bytes_names = npz(tmp_path / "b.npz", class_names=np.array(NAMES, "S"), vectors=VECTORS)
    assert from_npz(bytes_names).class_names == tuple(NAMES)


def test_pickled_arrays_are_refused_unread(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("the pickle was loaded",))

    path = npz(tmp_path / "a.npz", class_names=np.array([Trap(), "b", "c"], object), vectors=VECTORS)
    with pytest.raises(InvalidInput, match=r"'class_names' of the \.npz holds pickled"):
        from_npz(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 2), }", "does not fit"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (-3, 2), }", "does not fit"),
        ("{'descr': '<U0', 'fortran_order': False, 'shape': (3, 2), }", "does not fit"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (3, 2)", "damaged"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (3, 2), }", "pickled"),
    ],
)
def test_npy_headers_that_lie_are_refused(header: str, message: str, tmp_path: Path) -> None:
    text = header.ljust(117).encode() + b"\n"
    member = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + VECTORS.tobytes()
    names = io.BytesIO()
    np.save(names, np.array(NAMES))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("vectors.npy", member)
        archive.writestr("class_names.npy", names.getvalue())
    with pytest.raises(InvalidInput, match=message):
        from_npz(tmp_path / "a.npz")


def test_mat_files_of_xlsa17_are_read(tmp_path: Path) -> None:
    savemat(tmp_path / "a.mat", {"att": VECTORS.T, "original_att": VECTORS.T * 9, "allclasses_names": cells(NAMES)})
    table = from_mat(tmp_path / "a.mat")
    assert table.class_names == tuple(NAMES)
    np.testing.assert_array_equal(table.vectors, VECTORS.astype(np.float32))


def test_mat_files_of_matlab_7_3_are_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.mat", "w") as file:
        file["att"] = VECTORS  # MATLAB's (2, 3), axes reversed
        references = []
        for i, name in enumerate(NAMES):
            file[f"#refs#/{i}"] = np.array([[ord(c)] for c in name], np.uint16)
            references.append(file[f"#refs#/{i}"].ref)
        file.create_dataset("allclasses_names", (1, 3), h5py.ref_dtype, data=references)
    data = (tmp_path / "a.mat").read_bytes()
    head = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    path = write(tmp_path / "b.mat", head.ljust(512, b"\x00") + data)
    table = read_class_table(path, "attributes")
    assert table.class_names == tuple(NAMES)
    np.testing.assert_array_equal(table.vectors, VECTORS.astype(np.float32))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"att": VECTORS.T}, "no array class_names; it has att"),
        ({"allclasses_names": cells(NAMES)}, "no array vectors"),
        ({"att": np.ones((4, 5)), "allclasses_names": cells(NAMES)}, r"\(4, 5\), but there are 3"),
        ({"att": VECTORS.T, "allclasses_names": np.arange(3)}, "must hold texts"),
        ({"att": np.array(["a", "b", "c"]), "allclasses_names": cells(NAMES)}, "att|numbers"),
    ],
)
def test_unusable_mat_contents_are_told(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    savemat(tmp_path / "a.mat", content)
    with pytest.raises(InvalidInput, match=message):
        from_mat(tmp_path / "a.mat")


@pytest.mark.parametrize("suffix", [".npz", ".mat", ".csv", ".json"])
@pytest.mark.parametrize("data", [b"", b"\x00\x01\x02" * 100, b"PK\x03\x04 cut", b"MATLAB 5.0 MAT-file".ljust(140)])
def test_noise_is_refused_in_every_format(suffix: str, data: bytes, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        read_class_table(write(tmp_path / f"a{suffix}", data), "class_vectors")


@pytest.mark.parametrize("suffix", [".npz", ".mat"])
def test_cut_off_files_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        np.savez_compressed(path, class_names=NAMES, vectors=VECTORS)
    else:
        savemat(path, {"att": VECTORS.T, "allclasses_names": cells(NAMES)})
    whole = path.read_bytes()
    for length in range(1, len(whole) - 1, 37):
        path.write_bytes(whole[:length])
        with pytest.raises(InvalidInput):
            read_class_table(path, "attributes")


@pytest.mark.parametrize(
    "text",
    [
        'class,big,fast\n"persian+cat",1,0.5\nGrizzly_Bear,0,2\n003.Sooty_Albatross,-1,3\n',
        "\ufeffclass;big;fast\r\npersian+cat;1;0,5\r\nGrizzly_Bear;0;2,0\r\n003.Sooty_Albatross;-1;3\r\n",
        "\tbig\tfast\npersian+cat\t1\t.5\n\nGrizzly_Bear\t0\t2\n003.Sooty_Albatross\t-1\t3e0",
    ],
)
def test_csv_dialects_give_the_same_table(text: str, tmp_path: Path) -> None:
    table = from_csv(write(tmp_path / "a.csv", text.encode()))
    assert (table.class_names, table.attribute_names) == (tuple(NAMES), ("big", "fast"))
    np.testing.assert_array_equal(table.vectors, VECTORS.astype(np.float32))


def test_csv_without_header_and_with_commas_in_names(tmp_path: Path) -> None:
    table = from_csv(write(tmp_path / "a.csv", b'"cat, persian",1,2\ndog,3,4\n'), "class_vectors")
    assert table.class_names == ("cat, persian", "dog")
    numbered = from_csv(write(tmp_path / "b.csv", b"class,0,1\ndog,3,4\n"))
    assert (numbered.class_names, numbered.attribute_names) == (("dog",), ("0", "1"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"class,a,b\ncat,1,2\ndog,3\n", r"Line 3 \('dog'\) has 2 cells, 3"),
        (b"class,a,b\ncat,1,2\ndog,3,many\n", r"Line 3 \('dog'\), column 3 \('b'\) has 'many'"),
        (b"class,a,b\ncat,1,\n", "has '' instead of a number"),
        (b"class,a,b\n", "no classes"),
        (b"cat 1 2\n", "no comma"),
        (b"class,a\nz\xe8bre,1\n", "no UTF-8"),
        (b'class,a\n"cat,1\n', "no usable CSV"),
        (b"class,a\ncat,nan\n", "'cat' has nan"),
        (b"class,a\ncat,1e60\n", "'cat' has inf"),
        (b"class,a\ncat,0\n", "'cat' is all zero"),
        (b"class,a\ncat,1\nCAT,2\n", "same name"),
    ],
)
def test_unusable_csv_is_told_with_its_line(text: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_class_table(write(tmp_path / "a.csv", text), "attributes")


def test_json_and_inline_vectors(tmp_path: Path) -> None:
    vectors = dict(zip(NAMES, VECTORS.tolist(), strict=True))
    np.testing.assert_array_equal(from_mapping(vectors).vectors, VECTORS.astype(np.float32))
    path = write(tmp_path / "upload", json.dumps({"vectors": vectors}).encode())
    assert read_class_table(path, "attributes", filename="Mine.JSON").class_names == tuple(NAMES)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({}, "no classes"),
        ({"cat": [1, 2], "dog": [1, 2, 3]}, "'dog' has 3 numbers, class 'cat' has 2"),
        ({"cat": ["a", "b"]}, "'cat' is not a list of numbers"),
        ({"cat": 3}, "'cat' is not a list of numbers"),
        ({"cat": []}, "'cat' is not a list of numbers"),
        ({"cat": [[1], [1, 2]]}, "'cat' is not a list of numbers"),
        ({"cat": [1, None]}, "'cat' is not a list of numbers"),
        ({"cat": [1.0], "dog": [float("inf")]}, "'dog' has inf"),
        ({"": [1.0]}, "empty"),
    ],
)
def test_unusable_inline_vectors_name_the_class(vectors: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        from_mapping(vectors)


def test_lengths_that_disagree_are_both_quoted() -> None:
    with pytest.raises(ShapeMismatch, match=r"3 class names but 2 vectors of shape \(2, 2\)"):
        class_table("class_vectors", NAMES, VECTORS[:2])
    with pytest.raises(ShapeMismatch, match="1 attribute names but vectors of 2"):
        class_table("attributes", NAMES, VECTORS, ["big"])
    with pytest.raises(ShapeMismatch, match=r"attribute_vectors has 3 rows \(3, 4\)"):
        class_table("attributes", NAMES, VECTORS, ["big", "fast"], np.ones((3, 4)))


def test_arrays_that_are_no_matrix_of_numbers_are_refused() -> None:
    for bad in (
        VECTORS.astype(str),
        VECTORS * 1j,
        VECTORS.astype(object),
        VECTORS[0],
        VECTORS[:, :0],
        [[1], [2, 3], [4]],
    ):
        with pytest.raises(InvalidInput):
            class_table("class_vectors", NAMES, bad)


def test_dimensions_are_limited_at_and_past_the_limit() -> None:
    assert class_table("class_vectors", ["a"], np.ones((1, MAX_DIM))).dim == MAX_DIM
    with pytest.raises(InvalidInput, match=str(MAX_DIM)):
        class_table("class_vectors", ["a"], np.ones((1, MAX_DIM + 1)))


def test_unknown_endings_and_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"\.xlsx"):
        read_class_table(write(tmp_path / "a.xlsx", b"x"), "attributes")
    with pytest.raises(InvalidInput, match="kind"):
        class_table("word_vectors", NAMES, VECTORS)  # type: ignore[arg-type]  # which is the point


def test_a_saved_table_comes_back_the_same(tmp_path: Path) -> None:
    table = class_table("attributes", [*NAMES[:2], "北极熊"], VECTORS, ["big", "fast"], np.eye(2))
    table.save(tmp_path)
    again = ClassTable.load(tmp_path)
    assert (again.kind, again.class_names, again.attribute_names) == (table.kind, table.class_names, ("big", "fast"))
    np.testing.assert_array_equal(again.vectors, table.vectors)
    np.testing.assert_array_equal(again.attribute_vectors, np.eye(2))


@pytest.mark.parametrize("damage", ["missing", "cut", "format", "lengths"])
def test_a_damaged_saved_table_is_refused(damage: str, tmp_path: Path) -> None:
    class_table("class_vectors", NAMES, VECTORS).save(tmp_path)
    names, arrays = tmp_path / "class_table.json", tmp_path / "class_table.safetensors"
    if damage == "missing":
        arrays.unlink()
    elif damage == "cut":
        arrays.write_bytes(arrays.read_bytes()[:-3])
    else:
        change = {"format": "x"} if damage == "format" else {"class_names": ["one"]}
        names.write_text(json.dumps(json.loads(names.read_text()) | change))
    with pytest.raises(InvalidInput):
        ClassTable.load(tmp_path)


@pytest.mark.parametrize(
    ("path", "shape", "lookups"),
    [
        ("animals/knowledge/attributes.npz", (19, 85), ["Grizzly Bear", "giant-panda"]),
        ("animals/knowledge/minilm-l6-v2.npz", (19, 384), ["grizzly_bear"]),
        ("tiny188/knowledge/glove-300d.npz", (188, 300), ["abacus"]),
        ("awa1-handcrafted/knowledge/attributes.npz", (50, 85), ["persian cat", "killer_whale"]),
        ("xlsa17/AWA1/att_splits.mat", (50, 85), ["persian cat"]),
        ("xlsa17/AWA2/att_splits.mat", (50, 85), ["grizzly bear"]),
        ("xlsa17/SUN/att_splits.mat", (717, 102), ["access road"]),
        ("xlsa17/CUB/sent_splits.mat", (200, 1024), ["Laysan Albatross"]),
    ],
)
def test_real_tables(path: str, shape: tuple[int, int], lookups: list[str]) -> None:
    table = read_class_table(shared_path("data", *path.split("/")), "attributes")
    assert table.vectors.shape == shape
    assert require(table.lookup(lookups)).shape == (len(lookups), shape[1])
    np.testing.assert_array_equal(require(table.lookup(table.class_names)), table.vectors)


def test_awa_attributes_agree_between_mat_and_npz() -> None:
    mat = read_class_table(shared_path("data", "xlsa17", "AWA1", "att_splits.mat"), "attributes")
    own = read_class_table(shared_path("data", "awa1-handcrafted", "knowledge", "attributes.npz"), "attributes")
    a, b = mat.vectors, require(own.lookup(mat.class_names))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() > 0.99


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["colour::red", "shape::round", "colour::blue"], (0, 1, 0)),
        (["colour::red", "round", "colour::blue"], None),
        (["red", "round", "blue"], None),
        ([], None),
    ],
)
def test_groups_of_attributes_are_read_from_names_of_all_of_them(
    names: list[str], groups: tuple[int, ...] | None
) -> None:
    assert attribute_groups(names) == groups
