"""The documentation says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from models.catalog import METHODS
from service import configuration, methods
from service.app import create_app
from service.core.settings import Settings

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


def test_every_module_a_method_names_exists() -> None:
    for method in METHODS:
        module, _, attribute = method.path.partition(":")
        source = ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        assert re.search(rf"^(class|def) {attribute}\b", source, re.MULTILINE), method.path
