"""Every setting, read from the environment (`UNSEEN_…`) in this one place."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

_MAX_SOCKET_PATH = 100  # Linux allows 108 bytes with the final zero; some systems 104
OTHER_VARIABLES = {
    "UNSEEN_URL": "Address of the service that the Python client and the command line use (`http://127.0.0.1:8000`).",
    "UNSEEN_API_KEY": "API key that the Python client and the command line send.",
    "UNSEEN_WEIGHTS": "`docker-compose.yml`: folder of this machine that is the containers' `UNSEEN_WEIGHTS_DIR`.",
}
"""Variables that are no settings of the service: what reads each, and for what."""


class Settings(BaseSettings):
    """One row a setting: name, default, one sentence. `docs/configuration.md` is generated from this class."""

    model_config = SettingsConfigDict(env_prefix="UNSEEN_", extra="ignore")

    data_dir: Path = Field(Path("data"), description="Folder of everything the embedded default keeps.")
    database_url: str = Field("", description="SQLAlchemy URL; empty: SQLite in the data directory.")
    redis_url: str = Field("", description="Redis or Valkey URL; empty: the embedded server's unix socket.")
    store_url: str = Field("", description="fsspec URL of the artifact store; empty: a folder in the data directory.")
    weights_dir: Path | None = Field(None, description="Folder whose .pth/.safetensors files requests may name.")
    host: str = Field("127.0.0.1", description="Address the API listens on; others than loopback need API keys.")
    port: int = Field(8000, ge=0, le=65535, description="Port the API listens on.")
    api_keys: str = Field(
        "", description="Comma-separated name:sha256-of-key:scopes, scopes joined by + (read, write, admin)."
    )
    rate_limit_per_minute: int = Field(
        0, ge=0, description="Requests that each API key may make to one API process in a minute; 0: no limit."
    )
    inference_url: str = Field(
        "", description="http:// or unix:// address of the inference process; empty: embedded socket."
    )
    inference_listen: str = Field(
        "", description="Where the inference process listens, if not at inference_url: http://0.0.0.0:8001."
    )
    device: str = Field("auto", description="Device of workers and inference: auto, cpu, cuda or cuda:N.")
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="CPU threads of one worker or inference process; 0: one for each core that it may use. "
        "`unseen serve` then shares the cores out among its workers.",
    )
    workers: int = Field(1, ge=1, le=256, description="Workers of `unseen serve` a device, each with a job at a time.")
    backend: Literal["auto", "torch", "openvino", "onnxruntime", "compile"] = Field(
        "auto",
        description="What runs networks; auto: OpenVINO or ONNX Runtime on a CPU, torch.compile with CUDA graphs on a "
        "GPU, where it is installed and was measured to be clearly faster than torch, with the same features.",
    )
    worker_memory_bytes: int = Field(
        0, ge=0, description="Memory of a worker; classifiers that need more are refused. 0: that of the machine asked."
    )
    queue: str = Field("unseen", pattern=r"^[a-z0-9_-]{1,64}$", description="Queue that jobs go to and workers read.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe message logged.")

    max_image_bytes: int = Field(32 * 2**20, ge=1, description="Largest single image file, in bytes.")
    max_image_pixels: int = Field(64_000_000, ge=1, description="Most pixels of one image.")
    max_body_bytes: int = Field(512 * 2**20, ge=1, description="Largest multipart body of one request.")
    max_json_bytes: int = Field(
        64 * 2**20, ge=1, description="Largest JSON body of one request, or all text fields of a form."
    )
    max_held_bytes: int = Field(
        2 * 2**30,
        ge=1,
        description="Most bytes that bodies of one API process's requests hold in memory at a time; past it those over "
        "a MiB get 503, unless alone. Archives, features and knowledge files go to the disk and do not count.",
    )
    max_archive_bytes: int = Field(20 * 2**30, ge=1, description="Largest uploaded archive, feature or knowledge file.")
    max_archive_entries: int = Field(1_000_000, ge=1, description="Most entries of one archive.")
    max_files_per_request: int = Field(1000, ge=1, description="Most images in one upload request.")
    max_classes: int = Field(100_000, ge=1, description="Most class names of one request.")
    max_vector_dim: int = Field(65_536, ge=1, description="Most dimensions of a knowledge vector.")
    max_classify_images: int = Field(64, ge=1, description="Most images of one synchronous classify request.")
    request_timeout_s: float = Field(
        120.0,
        gt=0,
        description="Longest wait for the next piece of a request's body; the whole of it may take this long and one "
        "second more for each 1,024 bytes that have arrived. Past either the answer is 408. A connection is closed "
        "when the headers of its first request take as long, or those of a later one at most twice as long. How long "
        "the answer itself takes is not limited by it.",
    )
    inference_timeout_s: float = Field(60.0, gt=0, description="Longest the API waits for the inference process.")
    max_resident_bytes: int = Field(4 * 2**30, ge=1, description="Most bytes of models the inference process keeps.")
    max_attempts: int = Field(3, ge=1, le=100, description="Times a job is tried before it fails for good.")
    heartbeat_s: float = Field(3.0, gt=0, description="Interval between signs of life of workers and jobs.")
    lost_after_s: float = Field(15.0, gt=0, description="Silence after which a worker or job counts as lost.")
    reconcile_s: float = Field(3.0, gt=0, description="Interval of the reconciler that re-queues lost jobs.")
    cancel_kill_s: float = Field(8.0, gt=0, description="Time a running job has to heed a cancel before it is killed.")
    orphan_age_s: float = Field(
        86_400.0,
        ge=3600,
        le=3e9,
        description="Age at which an artifact that no row names is moved aside; after as long again it is deleted.",
    )
    idempotency_ttl_s: float = Field(86_400.0, gt=0, description="How long an Idempotency-Key is remembered.")

    @field_validator("device")
    @classmethod
    def _is_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise PydanticCustomError(
                "device", "'{given}' is no device; use auto, cpu, cuda or cuda:N", {"given": device}
            )
        return device

    @cached_property
    def resolved_database_url(self) -> str:
        """The database URL with the default filled in."""
        return self.database_url or f"sqlite:///{self.data_dir.resolve() / 'unseen.db'}"

    @cached_property
    def resolved_redis_url(self) -> str:
        """The Redis URL with the embedded server's socket filled in."""
        return self.redis_url or f"unix://{self.run_dir / 'valkey.sock'}"

    @cached_property
    def resolved_store_url(self) -> str:
        """The artifact store's URL with the default filled in."""
        return self.store_url or str(self.data_dir.resolve() / "artifacts")

    @cached_property
    def resolved_inference_url(self) -> str:
        """The inference process's address with the embedded socket filled in."""
        return self.inference_url or f"unix://{self.run_dir / 'inference.sock'}"

    @cached_property
    def run_dir(self) -> Path:
        """Where sockets lie: in the data directory, or, as a socket's path must be short, under the system's temp."""
        inside = self.data_dir.resolve() / "run"
        if len(str(inside)) + len("/inference.sock") <= _MAX_SOCKET_PATH:
            return inside
        digest = hashlib.sha256(str(self.data_dir.resolve()).encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"unseen-{os.getuid()}-{digest}"

    @cached_property
    def scratch_dir(self) -> Path:
        """Where unfinished uploads and job files lie; nothing here is ever published."""
        return self.data_dir.resolve() / "scratch"

    @cached_property
    def cache_dir(self) -> Path:
        """Where local copies of a remote store's artifacts lie; safe to remove."""
        return self.data_dir.resolve() / "cache"

    def make_dirs(self) -> None:
        """Creates the data, run and scratch directories; only this user may enter the one with the sockets."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.scratch_dir.mkdir(exist_ok=True)
        self.run_dir.mkdir(mode=0o700, exist_ok=True)
        owner = self.run_dir.lstat()
        if owner.st_uid != os.getuid() or not stat.S_ISDIR(owner.st_mode):
            raise PermissionError(
                f"{self.run_dir} belongs to somebody else; remove it or choose another UNSEEN_DATA_DIR."
            )
        self.run_dir.chmod(0o700)

    def to_environment(self) -> dict[str, str]:
        """The settings that differ from their defaults as `UNSEEN_…` variables, for child processes."""
        changed = self.model_dump(mode="json", exclude_defaults=True)
        return {f"UNSEEN_{name.upper()}": str(value) for name, value in changed.items() if value is not None}


def unknown_variables(environment: Mapping[str, str]) -> Iterator[tuple[str, str | None]]:
    """Each `UNSEEN_…` variable that sets nothing, with the setting that may be meant: most are misspelt."""
    known = [*(f"UNSEEN_{name.upper()}" for name in Settings.model_fields), *OTHER_VARIABLES]
    for name in sorted(environment):
        if name.startswith("UNSEEN_") and not name.startswith("UNSEEN_TEST_") and name not in known:
            yield name, next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.8)), None)
