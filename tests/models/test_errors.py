"""What messages of the error tree list."""

from __future__ import annotations

from models.catalog import METHODS
from models.errors import MAX_LISTED, UnknownName


def test_valid_names_are_all_listed_or_counted() -> None:
    methods = [row.name for row in METHODS if row.kind == "classifier"]
    text = str(UnknownName("classifier method", "zzzzzz", methods))
    assert all(repr(name) in text for name in methods)
    assert " more" not in text
    many = str(UnknownName("class", "zzzzzz", [f"class {i}" for i in range(MAX_LISTED + 7)]))
    assert many.endswith(" and 7 more.")
