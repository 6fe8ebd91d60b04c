"""Following a job to its end: Server-Sent Events while they come, long-polling where they do not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator

import httpx

from service.client_http import Json, ServiceUnreachable, Transport, UnseenError

TERMINAL = ("succeeded", "failed", "cancelled")
SILENCE_S = 20.0  # a live stream says something every second
OUTAGE_S = 60.0  # a service that restarts is back long before
POLL_S = 20.0

OnJob = Callable[[Json], None]
"""Called with the job whenever something about it changed."""


class JobFailed(UnseenError):
    """The job ended without a result; `job` is its last state."""

    def __init__(self, job: Json) -> None:
        self.job = job
        problem = job.get("error") or {}
        reason = problem.get("detail") or problem.get("title") or "No reason was recorded."
        lines = [f"{entry.get('pointer') or '/'}: {entry.get('message')}" for entry in problem.get("errors") or []]
        head = f"Job {job['id']} ({job['kind'].replace('_', ' ')}) was cancelled."
        if job["status"] == "failed":
            head = f"Job {job['id']} ({job['kind'].replace('_', ' ')}) failed: {reason}"
        super().__init__("\n  ".join([head, *(line for line in lines[:20] if not line.endswith(str(reason)))]))


class WaitTimeout(UnseenError, TimeoutError):
    """The job went on for longer than the caller wanted to wait; it still goes on."""


class JobFollower:
    """One job, watched until it ends. Breaks of the connection are bridged; nothing is reported twice."""

    def __init__(self, http: Transport, job_id: str, on_job: OnJob | None, timeout: float | None) -> None:
        self._http = http
        self._path = f"/v1/jobs/{job_id}"
        self._job_id = job_id
        self._on_job = on_job
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout if timeout is not None else None
        self._last_event_id: str | None = None
        self._job: Json = {}

    def run(self, *, poll: bool = False) -> Json:
        """The job as it ended. `poll`: without Server-Sent Events."""
        failures = 0
        lost_since: float | None = None
        while self._job.get("status") not in TERMINAL:
            self._check_deadline()
            try:
                if not poll and failures < 3:
                    try:
                        self._stream()
                        failures = 0
                        continue
                    except (httpx.TransportError, _NoEvents):
                        failures += 1
                self._poll(POLL_S if poll or failures >= 3 else 0.0)
                lost_since = None
            except ServiceUnreachable:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > OUTAGE_S:
                    raise
                time.sleep(0.5)
        return self._job

    def _stream(self) -> None:
        """Reads events until the job ends or the service asks to come back."""
        headers = {"Accept": "text/event-stream"}
        if self._last_event_id:
            headers["Last-Event-ID"] = self._last_event_id
        with self._http.stream(f"{self._path}/events", headers=headers, timeout=SILENCE_S) as response:
            if "text/event-stream" not in response.headers.get("content-type", ""):
                raise _NoEvents
            for event in parse_events(self._lines(response)):
                self._last_event_id = event.get("id") or self._last_event_id
                if event["event"] == "progress":
                    self._report({**self._job, "progress": json.loads(event["data"])})
                elif event["event"] in ("status", "end"):
                    self._report(json.loads(event["data"]))
                elif event["event"] == "reconnect":
                    return
        if self._job.get("status") not in TERMINAL:
            raise _NoEvents  # it ended in the middle

    def _lines(self, response: httpx.Response) -> Iterator[str]:
        for line in response.iter_lines():
            self._check_deadline()
            yield line

    def _poll(self, wait: float) -> None:
        if self._deadline is not None:
            wait = min(wait, max(self._deadline - time.monotonic(), 0.0))
        self._report(self._http.json("GET", self._path, params={"wait": f"{wait:.1f}"}))
        if wait == 0 and self._job["status"] not in TERMINAL:
            time.sleep(0.25)

    def _report(self, job: Json) -> None:
        if job == self._job:
            return
        self._job = job
        if self._on_job is not None and "status" in job:
            self._on_job(job)

    def _check_deadline(self) -> None:
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise WaitTimeout(
                f"Job {self._job_id} has not ended within {self._timeout:g} s; it goes on. Wait again, or cancel it."
            )


class _NoEvents(Exception):
    """No event stream, or one that broke off."""


def parse_events(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Server-Sent Events out of their lines: event, data, id. Comments and events without data are passed over."""
    event: dict[str, str] = {}
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                yield {"event": "message", **event, "data": "\n".join(data)}
            event, data = {}, []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif name in ("event", "id"):
            event[name] = value
