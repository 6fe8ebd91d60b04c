"""What the command line shows: durations, the bars of a job, the summary of an embedding set."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from service import cli_output


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What goes to the terminal's standard output."""
    out = io.StringIO()
    monkeypatch.setattr(cli_output, "console", Console(file=out, width=160, highlight=False))
    return out


def test_durations_read_well() -> None:
    assert [cli_output.duration(s) for s in (0.44, 12, 185, 7800)] == ["0.4 s", "12 s", "3 min 05 s", "2 h 10 min"]


def test_job_bars_tell_each_phase_once_without_a_terminal(shown: io.StringIO) -> None:
    def job(phase: str, completed: int) -> dict[str, Any]:
        progress = {"phase": phase, "completed": completed, "total": 10, "fraction": 0.5, "eta_s": 3.0}
        return {"id": "job_1", "status": "running", "progress": progress}

    with cli_output.JobBars("Class embeddings") as bars:
        bars.update({"id": "job_1", "status": "queued", "queue_position": 2, "progress": {}})
        for phase in ("features", "image_features"):
            for completed in (0, 5, 10):
                bars.update(job(phase, completed))
        bars.finish()
    lines = [line.split()[0] for line in shown.getvalue().splitlines()]
    assert lines == ["Class", "features", "image", "done"]


def test_job_bars_tell_each_note_once(shown: io.StringIO) -> None:
    with cli_output.JobBars("Classifier") as bars:
        for notes in ([], ["Batches of 8 are used."], ["Batches of 8 are used.", "Batches of 4 are used."]):
            for completed in (0, 1):
                progress = {"phase": "training", "completed": completed, "total": 9, "notes": notes}
                bars.update({"status": "running", "progress": progress})
    assert shown.getvalue().count("Batches of 8") == shown.getvalue().count("Batches of 4") == 1


def test_job_bars_on_a_terminal_show_counts_and_what_is_left() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with cli_output.JobBars("Build", console) as bars:
        progress = {"phase": "features", "completed": 40, "total": 80, "fraction": 0.5, "eta_s": 65}
        bars.update({"status": "running", "progress": progress})
        bars.finish()
    assert "40/80" in out.getvalue()
    assert "1 min 05 s left" in out.getvalue()


def test_the_summary_tells_relation_and_reason(shown: io.StringIO) -> None:
    row = {
        "id": "es_1",
        "name": "animals",
        "n_seen": 14,
        "n_unseen": 5,
        "dim": 150,
        "summary": {
            "n_patches": 7200,
            "n_images": 801,
            "patches_per_s": 66.0,
            "relation": {
                "name": "smo",
                "params": {"alpha": -1, "ridge": 0.03, "form": "fused"},
                "chosen": {"reason": "Best on held-out classes."},
            },
            "clusters": {"summary": "All 150 clusters are used."},
            "skipped_images": [{"filename": "a.jpg", "reason": "It is cut off."}],
        },
    }
    cli_output.show_embedding_set(row)
    text = " ".join(shown.getvalue().split())
    assert "14 seen, 5 unseen" in text
    assert "SMO, alpha -1, ridge 0.03, fused. Best on held-out classes." in text
    assert "7,200 patches of 801 images (66 patches/s)" in text
    assert "skipped a.jpg: It is cut off." in text
