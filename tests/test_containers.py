"""The container files name what exists; the script that checks them ends with what it found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from service.core.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text())
SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
GPU = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text())["services"]
IGNORED_BUT = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_variable_that_containers_set_is_a_setting() -> None:
    known = {f"UNSEEN_{name.upper()}" for name in Settings.model_fields}
    environments = [service.get("environment", {}) for service in (*SERVICES.values(), *GPU.values())]
    used = {name for environment in environments for name in environment if name.startswith("UNSEEN_")}
    used |= set(re.findall(r"\b(UNSEEN_\w+)=", DOCKERFILE))
    assert {"UNSEEN_DATABASE_URL", "UNSEEN_DEVICE", "UNSEEN_HOST"} <= used <= known


def test_settings_of_an_env_file_reach_our_parts_but_do_not_move_them() -> None:
    for name in ("api", "worker", "inference"):
        assert SERVICES[name]["env_file"] == [{"path": ".env", "required": False}]
        assert {"UNSEEN_HOST", "UNSEEN_PORT", "UNSEEN_DATA_DIR"} <= set(SERVICES[name]["environment"])


def test_a_password_of_any_characters_is_no_part_of_an_address() -> None:
    environment = SERVICES["api"]["environment"]
    assert "PASSWORD" not in environment["UNSEEN_DATABASE_URL"]
    assert environment["PGPASSWORD"] == SERVICES["postgres"]["environment"]["POSTGRES_PASSWORD"]


def test_services_build_stages_that_exist_and_the_override_names_services() -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE, re.MULTILINE)
    targets = {service["build"]["target"] for service in SERVICES.values() if "build" in service}
    bases = set(re.findall(r"--from=(\S+)", DOCKERFILE)) | set(re.findall(r"^FROM (\S+) AS", DOCKERFILE, re.M)[1:])
    assert targets | bases <= set(stages)
    assert set(GPU) <= set(SERVICES)


def test_the_build_gets_what_it_copies_and_every_package() -> None:
    copied = [name for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.M) for name in line.split()[:-1]]
    packages = [name for name in PROJECT["tool"]["setuptools"]["packages"] if "." not in name]
    modules = [f"{name}.py" for name in PROJECT["tool"]["setuptools"]["py-modules"]]
    for name in {*copied, *packages, *modules, *PROJECT["project"]["license-files"]} - {"."}:
        assert name in IGNORED_BUT, f".dockerignore keeps {name} out"
    assert all((ROOT / name).exists() for name in IGNORED_BUT if "*" not in name)


def test_the_images_hold_the_extras_they_need() -> None:
    api, worker = (set(match.split()) for match in re.findall(r"requirements\.py ([a-z0-9 ]+?) >", DOCKERFILE))
    assert worker == set(PROJECT["project"]["optional-dependencies"]) - {"dev"}
    assert api == worker - {
        "torch",
        "openvino",
        "onnx",
        "text",
        "hdf5",
    }  # what brings or serves torch, or is read by workers alone


def test_requirements_are_those_of_the_project() -> None:
    command = [sys.executable, "scripts/requirements.py", "postgres", "s3"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    extras = PROJECT["project"]["optional-dependencies"]
    assert answer.stdout.splitlines() == PROJECT["project"]["dependencies"] + extras["postgres"] + extras["s3"]


@pytest.mark.parametrize(
    ("compose", "code", "said"),
    [
        (None, 0, "SKIPPED: docker compose config"),
        ("exit 0", 0, "ok: docker compose config of docker-compose.yml and docker-compose.gpu.yml"),
        ('test "$1" = version || exit 15', 1, "failed: docker compose config of docker-compose.yml: exit code 15"),
    ],
)
def test_the_check_says_what_compose_answered(tmp_path: Path, compose: str | None, code: int, said: str) -> None:
    if compose is not None:
        (tmp_path / "docker-compose").write_text(f"#!/bin/sh\n{compose}\n")
        (tmp_path / "docker-compose").chmod(0o755)
    command = [sys.executable, "scripts/check_container.py", "--files"]
    own = {**os.environ, "PATH": str(tmp_path)}
    answer = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    assert answer.returncode == code
    assert said in answer.stdout + answer.stderr
