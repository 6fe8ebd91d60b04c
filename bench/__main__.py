"""`python -m bench [name ...]`: runs the benchmarks and leaves what they found in bench/out/<name>.json and <name>.md.

Each prints one JSON value to standard output, and tables to standard error.

Without names: those that take minutes. `memory`, `jobs` and `events` start services of their own, `training` takes a
quarter of an hour and `relations` an hour, so these must be named. Photos are the demo's pictures unless others are
named: see `python bench/serving.py --help`, which also compares with other servers, and `python bench/extraction.py
--help`. Plans (`*.yaml`) are run by `unseen bench`, see docs/benchmarks.md.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE / "out"
SHORT = ("smo", "knowledge", "extraction", "neighbours", "clustering", "serving", "guard")
ALL = (*SHORT, "jobs", "events", "memory", "training", "relations")


def machine() -> str:
    """Processor and versions, for the head of a result."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "numpy", "scikit-image"))
    return f"{model}, Python {platform.python_version()}, {versions}"


def main() -> int:
    """Runs what is named, one after the other; the exit code is the number of those that failed."""
    names = sys.argv[1:] or list(SHORT)
    unknown = [name for name in names if name not in ALL]
    if unknown:
        print(f"There is no benchmark {unknown[0]!r}; there are {', '.join(ALL)}.", file=sys.stderr)
        return 2
    OUT.mkdir(exist_ok=True)
    print(machine())
    n_failed = 0
    for name in names:
        print(f"== {name}", flush=True)
        command = [sys.executable, str(HERE / f"{name}.py")]
        with (OUT / f"{name}.json").open("w") as found, (OUT / f"{name}.md").open("w") as told:
            began = time.monotonic()
            failed = subprocess.run(command, stdout=found, stderr=told, cwd=HERE.parent, check=False).returncode != 0
        print((OUT / f"{name}.md").read_text(), f"({time.monotonic() - began:.0f} s{', FAILED' if failed else ''})\n")
        n_failed += failed
    return n_failed


if __name__ == "__main__":
    sys.exit(main())
