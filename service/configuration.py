"""`python -m service.configuration` prints docs/configuration.md: the table of all settings, from their class."""

from __future__ import annotations

import sys

from service.core.settings import OTHER_VARIABLES, Settings

HEAD = """# Configuration

Every setting is an environment variable. Sizes are in bytes, durations in seconds. This page is generated from
`service/core/settings.py` by `make configuration`; a test compares the two.

| variable | default | meaning |
|---|---|---|
"""
OTHERS = """
Variables that are no settings of the service:

| variable | meaning |
|---|---|
"""


def markdown() -> str:
    """The page."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default in ("", None) else f"`{field.default}`"
        rows.append(f"| `UNSEEN_{name.upper()}` | {default} | {field.description} |\n")
    others = [f"| `{name}` | {meaning} |\n" for name, meaning in OTHER_VARIABLES.items()]
    return HEAD + "".join(rows) + OTHERS + "".join(others)


if __name__ == "__main__":
    sys.stdout.write(markdown())
