"""Prefixed, sortable, opaque ids: `ds_01jd…` (48-bit milliseconds, then 80 random bits, base 32)."""

from __future__ import annotations

import secrets
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
PREFIXES = {
    "dataset": "ds",
    "image": "im",
    "knowledge": "kn",
    "embedding_set": "es",
    "classifier": "cl",
    "predictions": "pr",
    "job": "job",
}


def new_id(kind: str) -> str:
    """A fresh id of a resource kind; ids made later sort later (to the millisecond)."""
    number = (int(time.time() * 1000) << 80) | secrets.randbits(80)
    text = ""
    for _ in range(26):
        text = _ALPHABET[number & 31] + text
        number >>= 5
    return f"{PREFIXES[kind]}_{text}"
