from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from models.base import Progress
from models.errors import Cancelled, InvalidInput, MissingKnowledge
from models.knowledge.base import require
from models.knowledge.word_vector_files import VectorFileLimits, WordVectorFile
from models.knowledge.word_vectors import INDEX_FILES, WordVectorIndex
from tests.models.knowledge.files import WORDS, fasttext_text, glove_text, word2vec_binary, write
from tests.shared_data import shared_path


@pytest.fixture
def index(tmp_path: Path) -> WordVectorIndex:
    return WordVectorIndex.build(write(tmp_path / "words.txt", glove_text()), tmp_path / "index")


def how(index: WordVectorIndex, name: str) -> str:
    return index.lookup([name]).resolutions[0].how


FORMATS = {
    "glove.txt": glove_text(),
    "crlf.txt": glove_text().replace(b"\n", b"\r\n"),
    "bom.txt": b"\xef\xbb\xbf" + glove_text(),
    "no-last-newline.txt": glove_text().rstrip(),
    "tabs.txt": glove_text({w: v for w, v in WORDS.items() if " " not in w}).replace(b" ", b"\t"),
    "fasttext.vec": fasttext_text(),
    "word2vec.bin": word2vec_binary(),
    "word2vec-newlines.bin": word2vec_binary(newline=True),
    "glove.txt.gz": gzip.compress(glove_text()),
    "word2vec.bin.gz": gzip.compress(word2vec_binary()),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_vectors(name: str, tmp_path: Path) -> None:
    index = WordVectorIndex.build(write(tmp_path / name, FORMATS[name]), tmp_path / "index")
    words = [word for word in WORDS if " " not in word]
    lookup = index.lookup(words)
    np.testing.assert_array_equal(lookup.vectors, np.array([WORDS[w] for w in words], np.float32))
    assert [r.how for r in lookup.resolutions] == ["exact"] * len(words)
    assert lookup.vectors.dtype == np.float32
    assert index.manifest.n_skipped == 0


def test_words_with_spaces_are_split_from_the_right(index: WordVectorIndex) -> None:
    np.testing.assert_array_equal(index.lookup([". . ."]).vectors[0], WORDS[". . ."])


def test_many_blocks_give_the_same_as_one(tmp_path: Path, rng: np.random.Generator) -> None:
    """Entries cut by block borders: vectors of 3,000 numbers make the file several blocks long."""
    rows = rng.normal(size=(400, 3000)).astype(np.float32)
    for name, n in {"a.txt": 100, "a.bin": 400}.items():
        words = {f"w{i}": tuple(row.tolist()) for i, row in enumerate(rows[:n])}
        data = glove_text(words) if name == "a.txt" else word2vec_binary(words, newline=True)
        index = WordVectorIndex.build(write(tmp_path / name, data), tmp_path / f"{name}-index")
        np.testing.assert_array_equal(index.lookup(list(words)).vectors, np.array(list(words.values()), np.float32))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_multi_word_names_are_the_plain_mean_of_their_words(index: WordVectorIndex) -> None:
    expected = (np.array(WORDS["polar"]) + np.array(WORDS["bear"])) / 2
    for name in ("polar bear", "polar_bear", "Polar-Bear", "PolarBear", "polar+bears", "006.Polar_Bear"):
        lookup = index.lookup([name])
        np.testing.assert_allclose(lookup.vectors[0], expected, rtol=1e-6)
        assert lookup.resolutions[0].tokens == ("polar", "bear")
        assert how(index, name) == "averaged tokens: polar, bear"


def test_the_whole_name_comes_before_its_words(index: WordVectorIndex) -> None:
    np.testing.assert_array_equal(index.lookup(["Killer+Whale"]).vectors[0], WORDS["killer_whale"])
    assert how(index, "killer+whale") == "spelled killer_whale"
    assert how(index, "killer whales") == "singular of killer whales: killer_whale"


def test_exact_case_comes_before_another_case(index: WordVectorIndex) -> None:
    np.testing.assert_array_equal(index.lookup(["turkey"]).vectors[0], WORDS["turkey"])
    assert how(index, "turkey") == "exact"
    assert index.lookup(["TURKEY"]).resolutions[0].tokens == ("Turkey",)  # the more frequent of the two
    assert how(index, "Bear") == "case-folded"
    assert how(index, "ZÈBRE") == "case-folded"


def test_singular_and_plural_stand_in_for_each_other(index: WordVectorIndex) -> None:
    assert how(index, "Mice") == "singular of mice: mouse"
    assert how(index, "bears") == "singular of bears: bear"
    assert how(index, "wolf") == "plural of wolf: wolves"


def test_a_missing_word_of_a_name_is_told(index: WordVectorIndex) -> None:
    lookup = index.lookup(["grizzly bear"])
    assert lookup.resolutions[0].how == "partial: bear (without grizzly)"
    assert lookup.resolutions[0].missing_tokens == ("grizzly",)
    assert lookup.partial == lookup.resolutions
    (warning,) = lookup.warnings
    assert warning.startswith("Of 'grizzly bear' the knowledge source knows 'bear' but not 'grizzly', so")
    assert index.lookup(["polar bear", "bear", "qqq"]).warnings == []
    np.testing.assert_array_equal(require(lookup)[0], WORDS["bear"])
    with pytest.raises(MissingKnowledge, match="grizzly bear"):
        require(lookup, allow_partial=False)


def test_unknown_names_keep_a_zero_row_and_get_suggestions(index: WordVectorIndex) -> None:
    lookup = index.lookup(["bear", "elephnt", "polarbear", "qqq", "", "\ud800"])
    assert [r.found for r in lookup.resolutions] == [True, False, False, False, False, False]
    assert not lookup.vectors[1:].any()
    assert lookup.resolutions[1].suggestions == ("elephant",)
    assert lookup.resolutions[2].suggestions[0] == "polar bear"
    with pytest.raises(MissingKnowledge, match=r"'elephnt' .near: 'elephant'.") as caught:
        require(lookup, field="class_names")
    assert caught.value.names == ["elephnt", "polarbear", "qqq", "", "\ud800"]
    assert caught.value.field == "class_names"


def test_a_token_of_zeros_is_no_knowledge(tmp_path: Path) -> None:
    index = WordVectorIndex.build(write(tmp_path / "a.txt", b"pad 0 0\ncat 1 2\n"), tmp_path / "index")
    assert [r.found for r in index.lookup(["pad", "cat"]).resolutions] == [False, True]


def test_names_with_quotes_and_wildcards_are_plain_text(index: WordVectorIndex) -> None:
    lookup = index.lookup(["bear' OR 1=1 --", "be%", "b_ar"])
    assert not lookup.resolutions[1].found
    assert not lookup.resolutions[2].found


def test_the_first_of_a_repeated_token_counts(tmp_path: Path) -> None:
    index = WordVectorIndex.build(write(tmp_path / "a.txt", b"cat 1 2\ndog 3 4\ncat 5 6\n"), tmp_path / "index")
    np.testing.assert_array_equal(index.lookup(["cat"]).vectors, [[1, 2]])
    assert (index.manifest.n_rows, index.manifest.n_tokens, index.manifest.n_duplicates) == (3, 2, 1)


def test_few_bad_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    good = {f"w{i}": (float(i), 1.0) for i in range(5000)}
    lines = glove_text(good).split(b"\n")
    lines[10:10] = [b"short 1", b"text 1 x", b"\xff\xfe 1 2", b"nan 1 nan", b" 1 2"]
    index = WordVectorIndex.build(write(tmp_path / "a.txt", b"\n".join(lines)), tmp_path / "index")
    assert index.manifest.n_skipped == 5
    assert index.manifest.n_rows == 5000
    assert index.manifest.skipped_examples[0] == "line 11 has 1 numbers where 2 are expected"
    np.testing.assert_array_equal(index.lookup(["w4999"]).vectors, [[4999, 1]])


BAD_FILES = {
    "empty": (b"", "empty"),
    "blank": (b"\n \n", "empty"),
    "no numbers": (b"cat\ndog\n", "followed by its numbers"),
    "prose": (b"a cat sat on a mat\nand looked very much at it\n", "line 1"),
    "short line": (b"cat 1 2 3\ndog 1 2 3\nfox 1 2\n", "line 3 has 2 numbers where 3"),
    "long line": (b"cat 1 2 3\ndog 1 2 3\nfox 1 2 3 4\n", "line 3 has 4 numbers where 3"),
    "balanced lines": (b"cat 1 2 3\ndog 1 2 3 4\nfox 1 2\nowl 1 2 3\n", "line 2 .*; line 3"),
    "no number": (b"cat 1 2 3\ndog 1 x 3\n", "line 2 has 'x'"),
    "nan": (b"cat 1 2 3\ndog 1 nan 3\n", "line 2 has a NaN"),
    "overflow": (b"cat 1 2 3\ndog 1 1e39 3\n", "line 2 has a NaN or infinite"),
    "latin-1": (b"cat 1 2 3\nz\xe8bre 1 2 3\n", "line 2 has a word that is no UTF-8"),
    "header too long": (b"9 2\ncat 1 2\ndog 1 2\n", "announces 9 words, but the file has 2"),
    "header too short": (b"1 2\ncat 1 2\ndog 1 2\n", "announces 1 words, but the file has 2"),
    "header dim": (b"2 4\ncat 1 2\ndog 1 2\n", "announces 4 dimensions, but the lines have 2"),
    "header only": (b"2 4\n", "announces 2 words"),
    "header zero": (b"0 4\n", "no words"),
    "huge header": (b"99999999999 4\ncat 1 2 3 4\n", "announces 99999999999 words"),
    "huge dim": (b"2 999999\ncat", "999999"),
    "binary cut": (word2vec_binary()[:-7], r"cut off.*word 12"),
    "binary longer": (word2vec_binary() + b"more \x01\x02", "goes on after the 12 words"),
    "binary nan": (word2vec_binary({"a": (1.0, float("nan"))}), "word 1 has a NaN"),
    "gzip cut": (gzip.compress(glove_text())[:-12], "cut off or damaged"),
    "gzip noise": (b"\x1f\x8b" + bytes(range(100)), "cut off or damaged"),
    "gzip empty": (gzip.compress(b""), "empty"),
    "zip": (b"PK\x03\x04....", "zip"),
    "fasttext bin": (b"\xba\x16\x4f\x2f\x0c\x00", "fastText model"),
    "pickle": (b"\x80\x04\x95", "pickle"),
    "noise": (bytes(range(128, 256)) * 20, "numbers"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_unusable_files_are_refused_and_leave_nothing(case: str, tmp_path: Path) -> None:
    data, message = BAD_FILES[case]
    source = write(tmp_path / "words", data)
    with pytest.raises(InvalidInput, match=message):
        WordVectorIndex.build(source, tmp_path / "index")
    assert list(tmp_path.iterdir()) == [source]


def test_limits_hold_at_and_past_their_value(tmp_path: Path) -> None:
    source = write(tmp_path / "words.txt", gzip.compress(glove_text()))
    n_bytes = len(glove_text())
    WordVectorIndex.build(source, tmp_path / "ok", limits=VectorFileLimits(len(WORDS), 3, n_bytes))
    for number, limits in enumerate(
        [
            VectorFileLimits(max_tokens=len(WORDS) - 1),
            VectorFileLimits(max_dim=2),
            VectorFileLimits(max_bytes=n_bytes - 1),
        ]
    ):
        with pytest.raises(InvalidInput, match="allowed"):
            WordVectorIndex.build(source, tmp_path / f"bad{number}", limits=limits)


def test_a_file_without_line_ends_is_not_read_into_memory(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", b"1.5 " * 4_000_000)
    with pytest.raises(InvalidInput):
        WordVectorIndex.build(source, tmp_path / "index")


def test_a_one_dimensional_file_is_no_header(tmp_path: Path) -> None:
    with WordVectorFile(write(tmp_path / "a.txt", b"7 5\ncat 2\n")) as file:
        assert file.format == "text"
        assert [tokens for tokens, _ in file.blocks()] == [["7", "cat"]]


def test_progress_ends_at_the_file_size_and_may_cancel(tmp_path: Path) -> None:
    source = write(tmp_path / "words.txt", glove_text())
    seen: list[Progress] = []
    WordVectorIndex.build(source, tmp_path / "index", on_progress=seen.append)
    assert (seen[-1].completed, seen[-1].total) == (source.stat().st_size, source.stat().st_size)
    assert seen[-1].metrics["words"] == len(WORDS)

    def cancel(progress: Progress) -> None:
        if progress.completed:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        WordVectorIndex.build(source, tmp_path / "cancelled", on_progress=cancel)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index", "words.txt"]


def test_an_index_is_never_overwritten(index: WordVectorIndex, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        WordVectorIndex.build(tmp_path / "words.txt", index.directory)


def test_an_index_can_be_moved_and_opened_elsewhere(index: WordVectorIndex, tmp_path: Path) -> None:
    moved = tmp_path / "else where?#%20"
    moved.mkdir()
    for name in INDEX_FILES:
        (index.directory / name).rename(moved / name)
    again = WordVectorIndex.open(moved)
    assert (again.dim, again.manifest) == (3, index.manifest)
    np.testing.assert_array_equal(again.lookup(["bear"]).vectors, [WORDS["bear"]])


@pytest.mark.parametrize("damage", ["no manifest", "no tokens", "other format", "cut vectors", "other count"])
def test_a_damaged_index_is_refused(index: WordVectorIndex, damage: str) -> None:
    directory = index.directory
    manifest = json.loads((directory / "manifest.json").read_text())
    if damage == "no manifest":
        (directory / "manifest.json").unlink()
    elif damage == "no tokens":
        (directory / "tokens.sqlite").unlink()
    elif damage == "cut vectors":
        data = (directory / "vectors.npy").read_bytes()
        (directory / "vectors.npy").write_bytes(data[:-4])
    else:
        manifest |= {"format": "x"} if damage == "other format" else {"n_rows": 99}
        (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InvalidInput, match="Build it again"):
        WordVectorIndex.open(directory)


def test_vectors_stay_on_disk(index: WordVectorIndex) -> None:
    assert isinstance(index._vectors, np.memmap)


def test_real_glove_vectors(tmp_path: Path) -> None:
    path = shared_path("data", "word_vectors", "glove.twitter.27B.25d.top12k.txt")
    index = WordVectorIndex.build(path, tmp_path / "index")
    assert (index.dim, index.manifest.n_rows, index.manifest.n_skipped) == (25, 11_925, 0)
    plain = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        token, *numbers = line.split(" ")
        plain[token] = np.array(numbers, np.float32)
    names = ["persian+cat", "killer+whale", "dolphin", "Polar-Bear", "german+shepherd"]
    lookup = index.lookup(names)
    expected = [np.mean([plain[word.lower()] for word in name.replace("-", "+").split("+")], axis=0) for name in names]
    np.testing.assert_allclose(require(lookup), expected, rtol=1e-5, atol=1e-6)
    everything = index.lookup(list(plain))
    np.testing.assert_array_equal(everything.vectors, np.stack(list(plain.values())))
    assert {r.how for r in everything.resolutions} == {"exact"}
    missing = index.lookup(["elefant"]).missing
    assert "elephant" in missing[0].suggestions
