"""The command line: usage, messages, exit codes; what it shows; and, marked slow, the whole service behind it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from service import cli_doctor, cli_output, demo, steps
from service.cli import app, check_listening, read_settings
from service.cli_embed import names_of, parse_settings
from service.client import Client, UnseenError
from service.core.settings import Settings
from service.local import LocalService, free_port, private_environment

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"red": (200, 30, 30), "green": (30, 190, 40), "blue": (40, 50, 210), "grey": (120, 120, 120)}


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner(env={"NO_COLOR": "1", "COLUMNS": "200"})


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What goes to the terminal's standard output."""
    out = io.StringIO()
    console = Console(file=out, width=160, highlight=False)
    for module in (cli_output, demo, steps, cli_doctor):
        monkeypatch.setattr(module, "console", console)
    return out


def unseen(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "service.cli", *arguments]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=240)


def make_photos(root: Path, n: int = 6) -> Path:
    """Squares and stripes in colours: four seen classes and three unseen ones, with attributes and a splits.json."""
    rng = np.random.default_rng(0)
    names = [f"{shape}_{colour}" for shape in ("square", "stripes") for colour in COLOURS][:7]
    for name in names:
        (root / "images" / name).mkdir(parents=True)
        for i in range(n):
            (root / "images" / name / f"{i}.png").write_bytes(drawing(name, rng))
    seen, hidden = [*names[:3], names[4]], [names[3], *names[5:]]
    splits = {
        "seen_classes": seen,
        "unseen_classes": hidden,
        "train": [f"images/{c}/{i}.png" for c in seen for i in range(n - 2)],
        "test_seen": [f"images/{c}/{i}.png" for c in seen for i in range(n - 2, n)],
        "test_unseen": [f"images/{c}/{i}.png" for c in hidden for i in range(n)],
    }
    (root / "splits.json").write_text(json.dumps(splits))
    (root / "knowledge").mkdir()
    words = ["square", "stripes", *COLOURS]
    table = [[float(word in name.split("_")) for word in words] for name in names]
    np.savez(root / "knowledge" / "attributes.npz", class_names=names, vectors=table, attribute_names=words)
    return root


def drawing(name: str, rng: np.random.Generator) -> bytes:
    """One picture of a class such as 'stripes_red', as a PNG."""
    shape, colour = name.split("_")
    pixels = rng.integers(180, 255, (48, 48, 3))
    left, top = rng.integers(4, 12, 2)
    part: Any = slice(top, top + 28), slice(left, left + 28, 1 if shape == "square" else 6)
    pixels[part] = COLOURS[colour]
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


# ---- usage and messages ----------------------------------------------------------------------------


def test_help_names_every_command(runner: CliRunner) -> None:
    shown = runner.invoke(app, ["--help"]).output
    wanted = "serve api worker inference embed train classify doctor demo bench openapi version"
    assert all(f"  {name} " in shown for name in wanted.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "photos", "-o", "out.npz"], "Give one of --knowledge and --text-encoder"),
        (["embed", "photos", "--knowledge", "k", "-o", "out.xlsx"], "the suffix must be"),
        (["embed", "photos", "--knowledge", "k", "-o", "/no/such/folder/out.npz"], "There is no folder"),
        (["embed", "photos", "--knowledge", "k", "-o", "out.npz", "--set", "epochs"], "--set takes KEY=VALUE"),
        (["embed", "photos", "--knowledge", "k", "-o", "out.npz", "--data-dir", "d"], "--data-dir belongs to --local"),
        (["embed", "--knowledge", "k", "-o", "out.npz"], "Missing argument"),
        (["classify", "/no/such/photo.jpg"], "does not exist"),
        (["classify"], "Missing argument"),
        (["serve", "--port", "0"], "greater than or equal to 1"),
        (["openapi", "--check"], "--check compares with a file"),
        (["frobnicate"], "No such command"),
    ],
)
def test_wrong_usage_is_told_and_exits_with_2(runner: CliRunner, arguments: list[str], message: str) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_expected_errors_are_one_message_and_exit_with_1(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(drawing("square_red", np.random.default_rng(1)))
    nobody = f"http://127.0.0.1:{free_port()}"
    answer = unseen("classify", str(tmp_path / "a.png"), "--url", nobody)
    assert answer.returncode == 1
    assert "Start the service with 'unseen serve'" in answer.stderr
    assert "Traceback" not in answer.stderr + answer.stdout
    answer = unseen("serve", UNSEEN_PORT="many")
    assert answer.returncode == 1
    assert "UNSEEN_PORT" in answer.stderr
    answer = unseen("demo", "--data", str(tmp_path))
    assert answer.returncode == 1
    assert "holds no files in class folders" in answer.stderr


def test_serve_refuses_what_cannot_work() -> None:
    with pytest.raises(UnseenError, match="without API keys"):
        check_listening(Settings(host="0.0.0.0"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UnseenError, match="is taken"):
            check_listening(Settings(port=taken.getsockname()[1]))


def test_options_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSEEN_PORT", "9000")
    assert read_settings(port=None).port == 9000
    assert read_settings(port=8000).port == 8000


def test_a_variable_that_sets_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = io.StringIO()
    monkeypatch.setattr(cli_output, "error_console", Console(file=errors, width=160))
    for name in ("UNSEEN_PORT", "UNSEEN_URL", "UNSEEN_TEST_POSTGRES_URL"):
        monkeypatch.setenv(name, "9000")
    read_settings()
    assert not errors.getvalue()
    monkeypatch.setenv("UNSEEN_THREAD", "2")
    monkeypatch.setenv("UNSEEN_COLOUR", "red")
    read_settings()
    assert "UNSEEN_THREAD sets nothing; did you mean UNSEEN_THREADS?" in errors.getvalue()
    assert "UNSEEN_COLOUR sets nothing; docs/configuration.md" in errors.getvalue()
    monkeypatch.setenv("UNSEEN_KEY", "secret")
    read_settings()
    assert "UNSEEN_KEY sets nothing; did you mean UNSEEN_API_KEY?" in errors.getvalue()


def test_a_private_service_takes_nothing_of_anothers() -> None:
    environment = {
        "UNSEEN_REDIS_URL": "redis://prod",
        "UNSEEN_DATABASE_URL": "postgresql://prod",
        "UNSEEN_API_KEYS": "k",
        "UNSEEN_DEVICE": "cpu",
        "UNSEEN_MAX_IMAGE_BYTES": "5",
        "HOME": "/home/me",
    }
    kept = private_environment(environment)
    assert kept == {"UNSEEN_DEVICE": "cpu", "UNSEEN_MAX_IMAGE_BYTES": "5", "HOME": "/home/me"}


def test_parameters_from_settings() -> None:
    params = parse_settings(
        ["clustering.epochs=20", "patches.method=grid", "seed=3"], {"seed": 0, "patches": {"size": 64}}
    )
    assert params == {"seed": 3, "clustering": {"epochs": 20}, "patches": {"size": 64, "method": "grid"}}
    with pytest.raises(UnseenError, match="has nothing inside"):
        parse_settings(["seed.x=1"], {"seed": 0})
    assert names_of("a, b c ,,d") == ["a", "b c", "d"]


def test_openapi_goes_to_a_file_and_is_compared(runner: CliRunner, tmp_path: Path) -> None:
    path = tmp_path / "openapi.json"
    assert runner.invoke(app, ["openapi", "-o", str(path)]).exit_code == 0
    assert json.loads(path.read_bytes())["info"]["title"] == "Unseen"
    assert runner.invoke(app, ["openapi", "--check", "-o", str(path)]).exit_code == 0
    path.write_text("{}")
    result = runner.invoke(app, ["openapi", "--check", "-o", str(path)])
    assert result.exit_code == 1


def test_version_is_printed(runner: CliRunner) -> None:
    shown = [runner.invoke(app, [word]).output.strip() for word in ("version", "--version")]
    assert shown[0] == shown[1] != ""


# ---- doctor ----------------------------------------------------------------------------------------


def test_doctor_finds_this_machine_well(tmp_path: Path, shown: io.StringIO) -> None:
    settings = Settings(data_dir=tmp_path / "new", port=free_port())
    quick = (f for f in (check(settings) for check in (cli_doctor.python, cli_doctor.torch, cli_doctor.redis_server)))
    assert cli_doctor.show(quick)
    assert "embedded Valkey" in shown.getvalue()
    assert cli_doctor.data_dir(settings).found.endswith("(will be made)")
    assert cli_doctor.port(settings).level == "ok"
    assert cli_doctor.database(settings).level == "ok"
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_what_is_wrong(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = Settings(
            data_dir=Path("/proc/nowhere"),
            host="127.0.0.1",
            port=taken.getsockname()[1],
            redis_url=f"redis://me:secret@127.0.0.1:{free_port()}",
            weights_dir=tmp_path / "missing",
            api_keys="nonsense",
        )
        checks = (cli_doctor.redis_server, cli_doctor.weights, cli_doctor.keys, cli_doctor.data_dir)
        findings = {finding.name: finding for finding in (check(settings) for check in checks)}
        assert {finding.level for finding in findings.values()} == {"failure"}
        assert all(finding.advice for finding in findings.values())
        assert "secret" not in findings["Redis"].found
        assert not cli_doctor.show(iter(findings.values()))
    assert cli_doctor.weights(Settings(weights_dir=tmp_path)).level == "warning"


def test_training_from_scratch_is_the_small_network_s() -> None:
    assert steps.Network(None, "scratch").params() == {"name": "small_cnn", "weights": "scratch"}


def test_the_demo_plans_before_it_starts(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "photos", n=3)
    plan = demo.plan_demo(folder)
    assert plan.unseen == ("square_grey", "stripes_green", "stripes_blue")
    assert plan.live == "stripes_blue"
    assert set(plan.photos) == set(plan.unseen)
    assert plan.knowledge.name == "attributes.npz"
    assert demo.plan_demo(folder, unseen=["square_red"]).live is None
    with pytest.raises(UnseenError, match="--backbone"):
        demo.plan_demo(folder, weights="mine.pth")
    shutil.rmtree(folder / "images" / "square_blue")
    with pytest.raises(UnseenError, match="no photos of 1 classes"):
        demo.plan_demo(folder)
    (folder / "splits.json").unlink()
    with pytest.raises(UnseenError, match="Which classes shall stay unseen"):
        demo.plan_demo(folder)
    (folder / "knowledge" / "attributes.npz").unlink()
    with pytest.raises(UnseenError, match="--knowledge"):
        demo.plan_demo(folder, unseen=["square_red"])


# ---- the whole service -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    """All parts, started as `unseen serve` does."""
    folder = tmp_path_factory.mktemp("service")
    with LocalService(folder / "data") as service, Client(service.url) as client:
        service.wait_until_ready(client)
        yield service


@pytest.mark.slow
def test_demo_from_photos_to_predictions(service: LocalService, tmp_path: Path, shown: io.StringIO) -> None:
    plan = demo.plan_demo(make_photos(tmp_path / "photos"), fast=True)
    with Client(service.url) as client:
        demo.play(client, plan)
    text = shown.getvalue()
    assert "What the unseen classes are made of" in text
    assert "added live in" in text
    assert text.count("✓") + text.count("✗") == 3
    assert "33.3 %" in text  # chance of three
    assert "raw knowledge vectors (attributes)" in text


@pytest.mark.slow
def test_embed_train_and_classify_against_a_service(service: LocalService, tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "photos")
    out = tmp_path / "out.npz"
    options = ["--knowledge", str(folder / "knowledge" / "attributes.npz"), "--weights", "scratch", "--clusters", "8"]
    small = ["--patch-size", "32", "--set", "patches.n_patches=2", "--set", "clustering.epochs=2", "--relation", "smo"]
    answer = unseen("embed", str(folder), *options, *small, "--url", service.url, "-o", str(out))
    assert answer.returncode == 0, answer.stderr + answer.stdout
    assert "Wrote 7 vectors" in answer.stdout
    assert "without sending photos: unseen embed ds_" in answer.stdout
    with np.load(out, allow_pickle=False) as stored:
        assert len(stored["class_names"]) == 7
    answer = unseen("train", "--set", "epochs=5", "--url", service.url)
    assert answer.returncode == 0, answer.stderr + answer.stdout
    assert "unseen photos among the unseen classes" in answer.stdout
    classifier = re.findall(r"cl_\w+", answer.stdout)[-1]
    photo = str(folder / "images" / "stripes_blue" / "0.png")
    answer = unseen("classify", photo, "--classifier", classifier, "--scope", "unseen", "--url", service.url)
    assert answer.returncode == 0, answer.stderr + answer.stdout
    assert "stripes blue" in answer.stdout
    answer = unseen("embed", str(folder), *options, "--unseen", "stripes_pink", "--url", service.url, "-o", str(out))
    assert answer.returncode == 1
    assert "stripes_pink" in answer.stderr


@pytest.mark.slow
def test_serve_stops_on_sigint_and_refuses_a_second_start(service: LocalService, tmp_path: Path) -> None:
    second = unseen("serve", "--data-dir", str(service.data_dir), "--port", str(free_port()))
    assert second.returncode == 1
    assert "already runs on" in second.stderr
    assert "is ready" not in second.stderr
    assert f"Unseen is ready at {service.url}" in service.log.read_text()
    own = LocalService(tmp_path / "data")
    with own, Client(own.url) as client:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                client.version()
                break
            except UnseenError:
                time.sleep(0.1)
        assert own._process is not None
        own._process.send_signal(signal.SIGINT)
        assert own._process.wait(20) == 0
