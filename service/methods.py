"""`python -m service.methods` prints docs/methods.md: every method of the catalog with its parameters."""

from __future__ import annotations

import json
import sys
from typing import Any

from models.catalog import METHODS, Method

HEAD = """# Methods

What `method` (and `relation`) may name, with the parameters each takes in `params`; ⌕ marks those that
`search` looks through. `GET /v1/methods` gives the same as JSON. This page is generated from the catalog by
`make methods`; a test compares the two.
"""
TITLES = {
    "embedding": "Embeddings of seen classes",
    "relation": "Relations to unseen classes",
    "classifier": "Classifiers",
}


def markdown() -> str:
    """The page."""
    parts = [HEAD]
    for kind, title in TITLES.items():
        methods = [method for method in METHODS if method.kind == kind]
        parts.append(f"\n## {title}\n\n| method | what it does | paper |\n|---|---|---|\n")
        parts += [f"| [`{m.name}`](#{m.name}) | {_summary(m)} | [{m.paper}]({m.url}) |\n" for m in methods]
        told: set[type] = set()
        for method in methods:
            if method.params.model_fields and method.params not in told:
                parts.append(_parameters(method, [m.name for m in methods if m.params is method.params]))
                told.add(method.params)
    return "".join(parts)


def _summary(method: Method) -> str:
    return method.summary + (" Needs feature maps." if method.features == "spatial" else "")


def _parameters(method: Method, names: list[str]) -> str:
    rows = []
    for name, about in method.params.model_json_schema()["properties"].items():
        mark = " ⌕" if "search" in about else ""
        default = json.dumps(about.get("default"), ensure_ascii=False)
        rows.append(f"| `{name}`{mark} | `{default}` | {_bounds(about)} | {about.get('description', '')} |\n")
    anchors = "".join(f'<a id="{name}"></a>' for name in names)
    title = f"\n### {', '.join(names)}\n\n{anchors}\n\n"
    return title + "| parameter | default | bounds | |\n|---|---|---|---|\n" + "".join(rows)


def _bounds(about: dict[str, Any]) -> str:
    if "anyOf" in about:
        about = next((kind for kind in about["anyOf"] if kind.get("type") != "null"), about)
    if "enum" in about:
        return ", ".join(f"`{choice}`" for choice in about["enum"])
    low = f"≥ {about['minimum']:g}" if "minimum" in about else ""
    low = f"> {about['exclusiveMinimum']:g}" if "exclusiveMinimum" in about else low
    high = f"≤ {about['maximum']:g}" if "maximum" in about else ""
    high = f"< {about['exclusiveMaximum']:g}" if "exclusiveMaximum" in about else high
    return ", ".join(part for part in (low, high) if part)


if __name__ == "__main__":
    sys.stdout.write(markdown())
