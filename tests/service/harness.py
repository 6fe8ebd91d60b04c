"""The API on a real socket, with the fake inference process on a unix socket, and hands to look behind it."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import numpy as np
import uvicorn
from PIL import Image as Picture
from pydantic import BaseModel
from sqlalchemy import func, select

from service.app import create_app
from service.core import jobs
from service.core.ids import new_id
from service.core.settings import Settings
from service.core.tables import Base, Classifier, EmbeddingClass, EmbeddingSet, Job, Knowledge
from service.deps import Parts
from service.patience import protocol_with_patience
from service.schemas import JobOut
from tests.fakes import FakeInference


def eventually(holds: Callable[[], bool]) -> None:
    """Waits until it does."""
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.005)


class Server:
    """uvicorn in a thread."""

    def __init__(self, app: Any, **options: Any) -> None:
        config = uvicorn.Config(
            app, log_level="critical", ws="none", access_log=False, timeout_graceful_shutdown=1, **options
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the server did not start"
            time.sleep(0.005)

    @property
    def port(self) -> int:
        """The port it listens on."""
        port: int = self.server.servers[0].sockets[0].getsockname()[1]
        return port

    def stop(self) -> None:
        """Ends it."""
        self.server.should_exit = True
        self.thread.join(timeout=15)
        assert not self.thread.is_alive(), "the server did not stop"


class LiveApi:
    """One running API. `client` talks to it; `parts` are its own."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        settings.make_dirs()
        self.inference = FakeInference()
        self._inference_server = Server(
            self.inference.app, uds=settings.resolved_inference_url.removeprefix("unix://"), lifespan="off"
        )
        started = threading.Event()
        self.app = create_app(settings, started=started.set)
        self._server = Server(
            self.app, host="127.0.0.1", port=0, http=protocol_with_patience(settings.request_timeout_s)
        )
        assert started.is_set()
        self.port = self._server.port
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)

    @property
    def parts(self) -> Parts:
        """What the app's routes work with."""
        parts: Parts = self.app.state.parts
        return parts

    def stop_inference(self) -> None:
        """The inference process is gone."""
        self._inference_server.stop()

    def close(self) -> None:
        """Ends all of it."""
        self.client.close()
        self._server.stop()
        if self._inference_server.thread.is_alive():
            self._inference_server.stop()

    # ---- resources ----------------------------------------------------------------------------

    def dataset(self, **fields: Any) -> str:
        """A new dataset's id."""
        response = self.client.post("/v1/datasets", json={"name": "pets", **fields})
        assert response.status_code == 201, response.text
        return str(response.json()["id"])

    def filled_dataset(self, classes: Mapping[str, int], **fields: Any) -> str:
        """A dataset with so many images of each class."""
        dataset_id = self.dataset(**fields)
        seed = 0
        for name, n in classes.items():
            files = []
            for _ in range(n):
                seed += 1
                files.append(("files", (f"{seed}.png", png(seed))))
            response = self.client.post(f"/v1/datasets/{dataset_id}/images", files=files, data={"class_name": name})
            assert len(response.json()["accepted"]) == n, response.text
        return dataset_id

    def knowledge(self, status: str = "ready") -> str:
        """A knowledge source, as its job would leave it."""
        with self.parts.database.write() as session:
            row = Knowledge(id=new_id("knowledge"), name="words", kind="class_vectors", status=status, dim=3)
            session.add(row)
            if status != "ready":
                row.job_id = jobs.create_job(session, "index_knowledge", row.id, {}).id
        return row.id

    def embedding_set(self, vectors: Mapping[str, Any], unseen: tuple[str, ...] = (), **fields: Any) -> str:
        """An embedding set with these vectors, as its job would leave it."""
        dataset_id, knowledge_id = fields.pop("dataset_id", None) or self.dataset(), self.knowledge()
        dim = len(next(iter(vectors.values()))) if vectors else None
        with self.parts.database.write() as session:
            row = EmbeddingSet(
                id=new_id("embedding_set"),
                **{"name": "set", "status": "ready", "summary": {"relation": {"name": "smo"}}, **fields},
                dataset_id=dataset_id,
                knowledge_id=knowledge_id,
                method="vgse",
                relation="auto",
                dim=dim,
            )
            session.add(row)
            session.flush()
            session.add_all(
                EmbeddingClass(
                    embedding_set_id=row.id,
                    name=name,
                    position=i,
                    is_seen=name not in unseen,
                    vector=np.asarray(vector, "<f4").tobytes(),
                )
                for i, (name, vector) in enumerate(vectors.items())
            )
        return row.id

    def classifier(self, status: str = "ready", method: str = "sje") -> str:
        """A classifier, as its job would leave it."""
        dataset_id = self.dataset()
        with self.parts.database.write() as session:
            row = Classifier(
                id=new_id("classifier"), name="c", dataset_id=dataset_id, method=method, status=status, job_id="job_x"
            )
            session.add(row)
        return row.id

    # ---- looking ------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """How many rows each table holds, every artifact, and what lies in scratch."""
        with self.parts.database.read() as session:
            rows = {
                table.name: session.scalar(select(func.count()).select_from(table))
                for table in Base.metadata.sorted_tables
            }
        return {
            "rows": rows,
            "artifacts": sorted(self.parts.store.iter_keys()),
            "scratch": sorted(path.name for path in self.settings.scratch_dir.iterdir()),
        }

    def job(self, job_id: str) -> dict[str, Any]:
        """The job as the API shows it."""
        return checked(self.client.get(f"/v1/jobs/{job_id}"), JobOut)

    def add_job(self, status: str = "queued", **fields: Any) -> str:
        """A job that no worker knows of."""
        resource = self.dataset()
        with self.parts.database.write() as session:
            job = jobs.create_job(session, "import_archive", resource, {})
            job.status = status
            for name, value in fields.items():
                setattr(job, name, value)
        return job.id

    def set_job(self, job_id: str, **fields: Any) -> None:
        """Changes a job's row."""
        with self.parts.database.write() as session:
            job = session.get_one(Job, job_id)
            for name, value in fields.items():
                setattr(job, name, value)


def forged_cursor(path: str, key: str) -> str:
    """A cursor that the list at `path` could have given out, had it an item `key`."""
    return base64.urlsafe_b64encode(f"{path}\n{key}".encode()).decode("ascii")


def checked(response: httpx.Response, model: type[BaseModel], status: int = 200) -> dict[str, Any]:
    """The body, which must be what the contract says: each field there, no other, and of its type."""
    assert response.status_code == status, response.text
    body: dict[str, Any] = response.json()
    model.model_validate(body)
    assert set(body) == set(model.model_fields)
    return body


def problem(response: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    """The problem+json body, which must have this status and say these words."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"]
    body: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail", "instance"} <= set(body) <= {
        "type", "title", "status", "detail", "instance", "errors"
    }  # fmt: skip
    assert body["status"] == status
    assert body["type"].startswith("urn:unseen:problem:")
    assert all(set(entry) == {"pointer", "message"} for entry in body.get("errors", []))
    said = f"{body['detail']} {body.get('errors', '')}".lower()
    for word in words:
        assert word.lower() in said, (word, said)
    return body


def png(seed: int, side: int = 12) -> bytes:
    """A small picture whose content depends on `seed` only."""
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side + 2, 3), dtype=np.uint8)
    return encoded(Picture.fromarray(pixels), "PNG")


def encoded(picture: Any, image_format: str) -> bytes:
    """The picture's file."""
    out = io.BytesIO()
    picture.save(out, image_format)
    return out.getvalue()
