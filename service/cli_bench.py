"""`unseen bench`, from the command line's words to a service and back."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

from service.bench import Results, run, write_tables
from service.bench_plan import read_spec
from service.cli_output import console
from service.client import Client
from service.client_http import Json
from service.steps import private_service

PAPER_TABLES = Path(__file__).resolve().parents[1] / "bench" / "paper" / "tables.json"


def bench(
    plan: Path,
    data: Path,
    out: Path | None,
    *,
    url: str | None,
    data_dir: Path,
    weights_dir: Path | None,
    report: bool,
) -> bool:
    """Runs the benchmark of the file `plan` and prints its tables; False where a cell failed."""
    spec = read_spec(plan)
    results = Results(out or Path("bench") / "out" / plan.stem)
    n_failed = 0
    if not report:
        with ExitStack() as stack:
            if url is not None:
                client = stack.enter_context(Client(url))
            else:
                client = stack.enter_context(private_service(data_dir, weights_dir))[1]
            n_failed = run(client, spec, data, results)
    paper: list[Json] = json.loads(PAPER_TABLES.read_text("utf-8")) if PAPER_TABLES.is_file() else []
    console.print(write_tables(spec, data, results, paper), markup=False, highlight=False, soft_wrap=True)
    console.print(f"Tables and results: {results.folder}", soft_wrap=True)
    return n_failed == 0
