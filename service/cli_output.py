"""What the command line shows: progress bars of jobs and uploads, tables, errors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from service.client import Client
from service.client_http import Json

LONG_NAME = 30
console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)


def print_error(message: str) -> None:
    """One error, on stderr, in red where there are colours."""
    error_console.print(f"[bold red]Error:[/] {escape(message)}", soft_wrap=True)


def print_warning(message: str) -> None:
    """The same for what is no error."""
    error_console.print(f"[bold yellow]Warning:[/] {escape(message)}", soft_wrap=True)


def follow(client: Client, job: Json, title: str) -> Json:
    """Waits for a job with a bar for each phase; Ctrl-C cancels it. JobFailed as `Client.wait`."""
    with JobBars(title) as bars:
        try:
            ended = client.wait(job, on_progress=bars.update)
        except KeyboardInterrupt:
            client.cancel(job["id"])
            raise
        bars.finish()
    return ended


def print_rejected(rejected: Sequence[Json], n: int = 5) -> None:
    """The first files that were not taken, with the reason, and how many more there are."""
    for entry in rejected[:n]:
        console.print(f"  [yellow]not taken[/] {escape(entry['filename'])}: {escape(entry['reason'])}")
    if len(rejected) > n:
        console.print(f"  [yellow]and {len(rejected) - n:,} more[/]")


class JobBars:
    """Bars of one job: a headline with the time left, a line for each phase. Plain lines where there is no terminal."""

    def __init__(self, title: str, out: Console | None = None) -> None:
        self._out = out or console
        self._title = title
        self._began = time.monotonic()
        self._phase: str | None = None
        self._phase_began = self._began
        self._tasks: dict[str, TaskID] = {}
        self._n_notes = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[count]}", justify="right"),
            TextColumn("{task.fields[note]}", style="dim"),
            console=self._out,
            disable=not self._out.is_terminal,
        )

    def __enter__(self) -> JobBars:
        self._progress.start()
        self._head = self._progress.add_task(f"[bold]{escape(self._title)}", total=1.0, count="", note="")
        if self._progress.disable:
            self._out.print(self._title)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, job: Json) -> None:
        """Shows what the job says of itself."""
        progress = job.get("progress") or {}
        if job.get("status") == "queued":
            place = job.get("queue_position")
            self._progress.update(self._head, note=f"queued, place {place}" if place else "queued")
            return
        eta = progress.get("eta_s")
        note = f"about {duration(eta)} left" if eta is not None else duration(time.monotonic() - self._began)
        fraction = float(progress.get("fraction") or 0.0)
        self._progress.update(self._head, completed=fraction, count=f"{fraction:4.0%}", note=note)
        for sentence in (progress.get("notes") or [])[self._n_notes :]:
            self._out.print(f"[yellow]{escape(sentence)}[/]", soft_wrap=True)
            self._n_notes += 1
        phase = progress.get("phase")
        if phase:
            self._show_phase(str(phase), progress)

    def finish(self) -> None:
        """Everything is done."""
        self._end_phase()
        took = duration(time.monotonic() - self._began)
        self._progress.update(self._head, completed=1.0, count="100%", note=took)
        if self._progress.disable:
            self._out.print(f"  done in {took}")

    def _show_phase(self, phase: str, progress: Json) -> None:
        if phase != self._phase:
            self._end_phase()
            self._phase, self._phase_began = phase, time.monotonic()
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(f"  {readable(phase)}", total=None, count="", note="")
        completed, total = int(progress.get("completed") or 0), progress.get("total")
        count = f"{completed:,}/{total:,}" if total else f"{completed:,}"
        metrics = "  ".join(f"{name} {value:.3g}" for name, value in list((progress.get("metrics") or {}).items())[:3])
        self._progress.update(self._tasks[phase], completed=completed, total=total, count=count, note=escape(metrics))

    def _end_phase(self) -> None:
        if self._phase is None:
            return
        took = duration(time.monotonic() - self._phase_began)
        task = next(t for t in self._progress.tasks if t.id == self._tasks[self._phase])
        total = task.total or task.completed or 1
        self._progress.update(task.id, completed=total, total=total, note=took)
        if self._progress.disable:
            self._out.print(f"  {readable(self._phase):<16} {took:>8}")
        self._phase = None


@contextmanager
def upload_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for files; yields what takes (done, total)."""
    progress = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=28),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}", justify="right"),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task(escape(title), total=0)
        yield lambda done, total: progress.update(task, completed=done, total=total)
    if progress.disable:
        console.print(f"{title}: {progress.tasks[0].completed:,.0f} files")


def duration(seconds: float) -> str:
    """'0.4 s', '12 s', '3 min 05 s', '2 h 10 min'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def readable(name: str) -> str:
    """An identifier or a class name as one writes it."""
    return name.replace("_", " ")


def share(fraction: float | None) -> str:
    """A fraction as a percentage; a dash where nothing was measured."""
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def contributions(provenance: Json, n: int = 3) -> list[str]:
    """The seen classes that make up an unseen one: ['+0.42 wolf', '-0.31 deer']."""
    found = (provenance or {}).get("contributions") or []
    return [f"{entry['coefficient']:+.2f} {readable(entry['class_name'])}" for entry in found[:n]]


def show_embedding_set(row: Json) -> None:
    """Size, relation with its reason, clusters, what was skipped."""
    summary = row["summary"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    facts: list[tuple[str, Any]] = [
        ("embedding set", f"{row['name']} ({row['id']})" if row["name"] != row["id"] else row["id"]),
        ("classes", f"{row['n_seen']} seen, {row['n_unseen']} unseen"),
        ("dimensions", row["dim"]),
        ("made of", made_of(summary)),
        ("relation", relation(summary)),
        ("clusters", ((summary.get("clusters") or {}).get("summary"))),
    ]
    for name, value in facts:
        if value:
            table.add_row(name, escape(str(value)))
    console.print(table)
    for entry in (summary.get("skipped_images") or [])[:5]:
        console.print(f"  [yellow]skipped[/] {escape(entry['filename'])}: {escape(entry['reason'])}")


def show_classifier(row: Json) -> None:
    """Method, and the accuracies measured on test photos."""
    zsl, gzsl = row["metrics"].get("zsl") or {}, row["metrics"].get("gzsl") or {}
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    named = f"{row['name']} ({row['id']})" if row["name"] != row["id"] else row["id"]
    table.add_row("classifier", escape(named))
    table.add_row("method", escape(row["method"]))
    table.add_row("T1", f"{share(zsl.get('t1'))} (unseen photos among the unseen classes)")
    parts = ", ".join(f"{part.upper()} {share(gzsl.get(part))}" for part in ("u", "s", "h"))
    table.add_row("among all", f"{parts} (unseen photos, seen photos, harmonic mean)")
    console.print(table)


def made_of(summary: Json) -> str:
    """'5,040 patches of 560 images (120 patches/s)'."""
    if not summary.get("n_patches"):
        return ""
    rate = summary.get("patches_per_s")
    return f"{summary['n_patches']:,} patches of {summary.get('n_images', 0):,} images" + (
        f" ({rate:,.0f} patches/s)" if rate else ""
    )


def relation(summary: Json) -> str:
    """The relation, its parameters, and why it was chosen."""
    found = summary.get("relation") or {}
    params = found.get("params") or {}
    if found.get("name") == "smo":
        text = f"SMO, alpha {params.get('alpha')}, ridge {params.get('ridge'):g}, {params.get('form')}"
    else:
        text = f"WAvg, {params.get('n_neighbors')} neighbours, eta {params.get('eta'):g}, {params.get('form')}"
    reason = (found.get("chosen") or {}).get("reason")
    return f"{text}. {reason}" if reason else text


def show_contributions(rows: Sequence[Json]) -> None:
    """Each unseen class with the seen classes it is composed of."""
    show_named_lists(
        "What the unseen classes are made of",
        ("unseen class", "seen classes that contribute most"),
        [("", row["name"], contributions(row["provenance"])) for row in rows],
    )


def show_named_lists(title: str, heads: tuple[str, str], rows: Sequence[tuple[str, str, Sequence[str]]]) -> None:
    """Rows of (mark in rich's markup, name, items): as a table, or where names are long, one item a line."""
    console.print(title, style="italic", soft_wrap=True)
    if any(len(name) > LONG_NAME for _, name, _ in rows):
        for mark, name, items in rows:
            console.print(f"{mark} [bold]{escape(readable(name))}[/]".strip(), soft_wrap=True)
            for item in items:
                console.print(f"    {escape(item)}", soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False)
    for head in (*([""] if any(mark for mark, _, _ in rows) else []), *heads):
        table.add_column(head)
    for mark, name, items in rows:
        cells = [escape(readable(name)), escape(", ".join(items))]
        table.add_row(*([mark] if mark else []), *cells)
    console.print(table)
