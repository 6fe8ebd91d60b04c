"""Prints what the project needs, without the project: `python scripts/requirements.py postgres s3 > requirements.txt`.

The Dockerfile installs this before it copies the code, so that a change of code does not install torch anew.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def main() -> None:
    """The dependencies of ./pyproject.toml and of the extras named on the command line, one a line."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][name] for name in sys.argv[1:]]
    print("\n".join(sum(extras, project["dependencies"])))


if __name__ == "__main__":
    main()
