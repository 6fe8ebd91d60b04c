"""What every part of the Python client stands on: the connection, any resource by its id, jobs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, Self

import httpx

from service.client_http import Json, ServiceUnreachable, Transport, UnseenError
from service.client_jobs import JobFailed, JobFollower, OnJob, WaitTimeout

DEFAULT_URL = "http://127.0.0.1:8000"
_PATHS = {
    "ds": "datasets",
    "kn": "knowledge",
    "es": "embedding-sets",
    "cl": "classifiers",
    "pr": "predictions",
    "job": "jobs",
}


class Connection:
    """A connection to one service and what is common to all resources."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 120.0,
        retries: int = 4,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        address = base_url or os.environ.get("UNSEEN_URL") or DEFAULT_URL
        key = os.environ.get("UNSEEN_API_KEY") if api_key is None else api_key
        self._http = Transport(address, key, timeout, retries, transport)

    @property
    def base_url(self) -> str:
        """The service's address."""
        return self._http.base_url

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    # ---- the service ------------------------------------------------------------------------------

    def version(self) -> Json:
        """{version, api}."""
        return as_object(self._http.json("GET", "/version"))

    def ready(self) -> Json:
        """{ready, checks}: whether every part can work, and what is wrong if not."""
        return as_object(self._http.json("GET", "/readyz", accept=(503,), retries=0))

    def wait_until_ready(self, timeout: float = 120.0) -> Json:
        """Returns when every part can work; WaitTimeout says which one could not."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                state = self.ready()
                if state["ready"]:
                    return state
                reason = "; ".join(f"{name}: {text}" for name, text in state["checks"].items() if text != "ok")
            except ServiceUnreachable as error:
                reason = str(error)
            if time.monotonic() > deadline:
                raise WaitTimeout(f"The service was not ready within {timeout:g} s. {reason}")
            time.sleep(0.25)

    def methods(self) -> list[Json]:
        """Every method with its parameters, defaults, bounds and paper."""
        return list(self._http.json("GET", "/v1/methods"))

    def get(self, resource_id: str) -> Json:
        """Any resource by its id (ds_…, kn_…, es_…, cl_…, job_…)."""
        return as_object(self._http.json("GET", _path(resource_id)))

    def delete(self, resource_id: str) -> None:
        """Deletes a resource that nothing uses. One that is gone already is no error."""
        self._http.request("DELETE", _path(resource_id), accept=(404,))

    def list_all(
        self, what: Literal["datasets", "knowledge", "embedding-sets", "classifiers", "jobs"]
    ) -> Iterator[Json]:
        """All resources of a kind, newest first; pages are fetched as they are needed."""
        yield from self._pages(f"/v1/{what}", {})

    # ---- jobs -------------------------------------------------------------------------------------

    def job(self, job_id: str, *, wait: float = 0) -> Json:
        """One job, as soon as it has ended or after `wait` seconds (at most 60)."""
        return as_object(self._http.json("GET", f"/v1/jobs/{job_id}", params={"wait": wait} if wait else None))

    def wait(
        self, job: str | Json, *, on_progress: OnJob | None = None, timeout: float | None = None, poll: bool = False
    ) -> Json:
        """The job when it has succeeded; JobFailed when it has not, WaitTimeout when it still goes on.

        `on_progress` gets the job at each change. The connection may break meanwhile. `poll`: no event stream.
        """
        job_id = job if isinstance(job, str) else str(job["id"])
        ended = JobFollower(self._http, job_id, on_progress, timeout).run(poll=poll)
        if ended["status"] != "succeeded":
            raise JobFailed(ended)
        return ended

    def cancel(self, job_id: str) -> Json:
        """Cancels a job: at once if it waits, within seconds if it runs."""
        return as_object(self._http.json("POST", f"/v1/jobs/{job_id}/cancel"))

    def retry(self, job_id: str) -> Json:
        """Queues a failed or cancelled job again; finished steps come from the cache."""
        return as_object(self._http.json("POST", f"/v1/jobs/{job_id}/retry"))

    def _pages(self, path: str, query: Mapping[str, Any]) -> Iterator[Json]:
        cursor: str | None = None
        while True:
            params = {**query, "limit": 100} | ({"cursor": cursor} if cursor else {})
            page = self._http.json("GET", path, params=params)
            yield from page["data"]
            cursor = page["next_cursor"]
            if not page["has_more"]:
                return


def as_object(answer: Any) -> Json:
    if not isinstance(answer, dict):
        raise UnseenError("The answer is no JSON object: is this the address of an Unseen service?")
    return answer


def _path(resource_id: str) -> str:
    prefix = resource_id.split("_", 1)[0]
    if prefix not in _PATHS or "/" in resource_id:
        raise UnseenError(f"{resource_id!r} is no id of a resource; they begin with {', '.join(_PATHS)} and '_'.")
    return f"/v1/{_PATHS[prefix]}/{resource_id}"
