from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import InvalidInput
from models.knowledge.names import (
    normalize_class_name,
    number_variants,
    readable_name,
    split_words,
    strip_index,
    tokens_of,
    validate_class_names,
)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("Persian+Cat", "persian cat"),
        ("grizzly_bear", "grizzly bear"),
        ("  polar - bear ", "polar bear"),
        ("Straße", "strasse"),
        ("ｃａｔ／ｄｏｇ", "cat dog"),  # full-width letters
        ("Cafe\u0301", "café"),
        ("black\u2013footed\u00a0ferret", "black footed ferret"),
        ("shep\u00adherd", "shepherd"),  # soft hyphen
        ("002.Laysan_Albatross", "002 laysan albatross"),
        ("+-_./", ""),
    ],
)
def test_spellings_of_a_name_are_compared_alike(name: str, key: str) -> None:
    assert normalize_class_name(name) == key


@given(st.text(max_size=30))
def test_normalisation_is_idempotent_and_leaves_no_separators(name: str) -> None:
    key = normalize_class_name(name)
    assert normalize_class_name(key) == key
    assert key == key.strip()
    assert "  " not in key
    assert not set(key) & set("_+-./\t\n")


@given(st.lists(st.text("abcXYZéßΣ012", min_size=1, max_size=6), min_size=1, max_size=4), st.sampled_from(" _-+./"))
def test_normalisation_ignores_case_and_the_kind_of_separator(words: list[str], separator: str) -> None:
    assert normalize_class_name(separator.join(words)) == normalize_class_name(" ".join(words).upper().lower())


@given(st.lists(st.text(min_size=1, max_size=12), max_size=8))
def test_accepted_names_are_distinct_and_never_empty(names: list[str]) -> None:
    try:
        accepted = validate_class_names(names)
    except InvalidInput:
        return
    assert accepted == tuple(name.strip() for name in names)
    keys = [normalize_class_name(name) for name in accepted]
    assert all(keys)
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("names", "field", "words"),
    [
        (["cat", ""], "class_names/1", ["empty"]),
        (["  "], "class_names/0", ["empty"]),
        (["ok", "x" * 300], "class_names/1", ["300", "256"]),
        (["c\x00at"], "class_names/0", ["U+0000", "character 1"]),
        (["cat\n"], "class_names/0", ["U+000A"]),
        (["abc\u202edef"], "class_names/0", ["U+202E"]),
        (["bad\ud800"], "class_names/0", ["U+D800"]),
        (["Polar_Bear", "dog", "polar bear"], "class_names/2", ["'Polar_Bear'", "'polar bear'", "position 0"]),
        (["---"], "class_names/0", ["separators"]),
        (["cat", 7], "class_names/1", ["int"]),
        ("cat", "class_names", ["list"]),
    ],
)
def test_bad_names_are_refused_with_their_position(names: list[str], field: str, words: list[str]) -> None:
    with pytest.raises(InvalidInput) as caught:
        validate_class_names(names)
    assert caught.value.field == field
    for word in words:
        assert word in str(caught.value)


def test_the_number_of_names_is_limited_also_for_generators() -> None:
    assert len(validate_class_names((f"c{i}" for i in range(10)), max_count=10)) == 10
    with pytest.raises(InvalidInput, match="11 names"):
        validate_class_names([f"c{i}" for i in range(11)], max_count=10)
    with pytest.raises(InvalidInput, match="more than the 10"):
        validate_class_names((f"c{i}" for i in range(11)), max_count=10)


def test_a_length_at_the_limit_is_accepted_and_unicode_is_kept() -> None:
    assert validate_class_names(["é" * 256]) == ("é" * 256,)
    assert validate_class_names([" 北极熊 ", "Ärger", "مکث‌ها"]) == ("北极熊", "Ärger", "مکث‌ها")


def test_words_of_a_name() -> None:
    assert tokens_of("persian+cat") == ("persian", "cat")
    assert tokens_of("002.Laysan_Albatross") == ("Laysan", "Albatross")
    assert tokens_of("boeing 747") == ("boeing", "747")
    assert tokens_of("747") == ("747",)
    assert strip_index("3.14") == "3.14"
    assert readable_name("010.Red_winged_Blackbird") == "Red winged Blackbird"


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("PolarBear", ("Polar", "Bear")),
        ("HTTPServer", ("HTTP", "Server")),
        ("boeing747", ("boeing", "747")),
        ("BMW", ("BMW",)),
        ("bear", ("bear",)),
        ("ÉlanVital", ("Élan", "Vital")),
        ("", ()),
    ],
)
def test_fall_back_words_of_a_token(token: str, words: tuple[str, ...]) -> None:
    assert split_words(token) == words


@pytest.mark.parametrize(
    ("many", "one"),
    [
        ("mice", "mouse"),
        ("dormice", "dormouse"),
        ("ponies", "pony"),
        ("boxes", "box"),
        ("wolves", "wolf"),
        ("horses", "horse"),
        ("churches", "church"),
        ("firewomen", "firewoman"),
        ("buses", "bus"),
        ("tomatoes", "tomato"),
    ],
)
def test_number_variants_know_both_directions(many: str, one: str) -> None:
    assert ("singular", one) in number_variants(many)
    assert ("plural", many) in number_variants(one)


def test_words_that_only_look_plural_get_no_singular() -> None:
    for word in ("grass", "octopus", "tennis"):
        assert not [form for number, form in number_variants(word) if number == "singular"]
    assert ("singular", "brewer") in number_variants("brewer's")
