"""Who may load what, looked at in a fresh interpreter; the import contracts; and that packaging names every package."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "torchvision", "skimage", "sklearn", "sentence_transformers")


def loaded_by(module: str) -> set[str]:
    """Top-level packages that importing `module` alone brings in."""
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}}, sep='\\n')"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return set(answer.stdout.split())


@pytest.mark.parametrize("module", ["service.app", "service.supervisor", "service.demo", "service.cli_doctor"])
def test_the_api_and_the_command_line_never_load_torch(module: str) -> None:
    loaded = loaded_by(module)
    assert not loaded & set(HEAVY)
    assert "workers" not in loaded


def test_the_command_line_starts_without_the_server() -> None:
    assert not loaded_by("service.cli") & {*HEAVY, "workers", "fastapi", "uvicorn", "rq"}


def test_the_client_needs_little() -> None:
    assert not loaded_by("unseen") & {*HEAVY, "workers", "fastapi", "uvicorn", "sqlalchemy", "redis", "typer"}


def test_import_contracts_hold() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    answer = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120, env={**os.environ, "NO_COLOR": "1"}
    )
    assert answer.returncode == 0, answer.stdout[-3000:]


def test_every_package_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = project["tool"]["setuptools"]["packages"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("models", "service", "workers")
        for path in (ROOT / top).rglob("__init__.py")
    }
    with_code = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("models", "service", "workers")
        for path in (ROOT / top).rglob("*.py")
    }
    assert sorted(listed) == sorted(found)
    assert with_code == found, "a folder with code lacks __init__.py"
    assert (ROOT / f"{project['tool']['setuptools']['py-modules'][0]}.py").is_file()


def test_files_stay_readable() -> None:
    """House rule: no file over 400 lines."""
    long = {
        str(path.relative_to(ROOT)): n
        for top in ("models", "service", "workers")
        for path in (ROOT / top).rglob("*.py")
        if (n := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long


def test_the_committed_openapi_document_is_current() -> None:
    command = [sys.executable, "-m", "service.cli", "openapi", "--check", "-o", "openapi/openapi.json"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert answer.returncode == 0, answer.stderr
