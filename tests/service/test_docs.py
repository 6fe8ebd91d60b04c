"""The documentation says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from models.catalog import METHODS
from service import configuration, methods
from service.app import create_app
from service.core.errors import ERRORS
from service.core.settings import OTHER_VARIABLES, Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("bench/*.md")])


def test_the_table_of_settings_is_the_settings_class() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == configuration.markdown()


def test_methods_page_is_that_of_the_catalog() -> None:
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == methods.markdown()
    assert all(field.description for field in Settings.model_fields.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_the_walk_through_uses_routes_that_exist(tmp_path: Path) -> None:
    app = create_app(Settings(data_dir=tmp_path))
    known = [re.sub(r"\{[^}]+\}", "[^/]+", path) + "$" for path in app.openapi()["paths"]]
    text = (ROOT / "docs" / "rest.md").read_text(encoding="utf-8")
    used = {match.split("?")[0] for match in re.findall(r"\$U(/[^\s\"']+)", text)}
    assert len(used) > 10
    for path in used:
        assert any(re.match(pattern, path) for pattern in known), f"docs/rest.md uses {path}, which no route answers"


def test_classes_of_the_pages_commands_are_creatures() -> None:
    known = {path.name for path in (ROOT / "examples" / "creatures" / "images").iterdir()}
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        named = set(re.findall(r"[a-z-]+(?:_[a-z-]+)*_with_[a-z_]+", page.read_text(encoding="utf-8")))
        assert named <= known, f"{page.name} names {named - known}, which examples/creatures has not"


def test_files_of_the_pages_commands_are_there() -> None:
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for name in re.findall(r"examples/[\w./-]+(?![\w./…$-])", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{page.name} names {name}, which is not there"


def test_variables_of_the_pages_exist() -> None:
    known = {f"UNSEEN_{name.upper()}" for name in Settings.model_fields} | set(OTHER_VARIABLES)
    for page in PAGES:
        named = set(re.findall(r"\bUNSEEN_[A-Z][A-Z_]*[A-Z]\b", page.read_text(encoding="utf-8")))
        assert {name for name in named if not name.startswith("UNSEEN_TEST_")} <= known, page.name


def test_the_table_of_errors_is_whole() -> None:
    text = (ROOT / "openapi" / "README.md").read_text(encoding="utf-8")
    for error in ERRORS:
        if error.status != 500:
            assert f"| {error.status} | `{error.slug}` |" in text


def test_every_module_a_method_names_exists() -> None:
    for method in METHODS:
        module, _, attribute = method.path.partition(":")
        source = ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        assert re.search(rf"^(class|def) {attribute}\b", source, re.MULTILINE), method.path
