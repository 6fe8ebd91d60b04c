"""Small word-vector files in every format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

WORDS: dict[str, tuple[float, ...]] = {
    "the": (0.1, 0.2, 0.3),
    "bear": (1.0, 0.0, 2.0),
    "polar": (0.0, 4.0, -1.0),
    "Turkey": (9.0, 9.0, 9.0),
    "turkey": (1.0, 1.0, 1.0),
    "mouse": (0.5, 0.25, -0.125),
    "wolves": (3.0, 1.0, 1.0),
    "killer_whale": (7.0, 7.0, 0.0),
    "whale": (1.0, 2.0, 3.0),
    "zèbre": (5.0, 5.0, 4.0),
    "elephant": (2.0, 2.0, 1.0),
    ". . .": (6.0, 6.0, 6.0),
}


def glove_text(words: Mapping[str, Sequence[float]] = WORDS) -> bytes:
    lines = [" ".join([word, *(repr(x) for x in vector)]) for word, vector in words.items()]
    return ("\n".join(lines) + "\n").encode()


def fasttext_text(words: Mapping[str, Sequence[float]] = WORDS) -> bytes:
    dim = len(next(iter(words.values())))
    lines = [" ".join([word, *(repr(x) for x in vector)]) + " " for word, vector in words.items()]
    return (f"{len(words)} {dim}\n" + "\n".join(lines) + "\n").encode()


def word2vec_binary(words: Mapping[str, Sequence[float]] = WORDS, *, newline: bool = False) -> bytes:
    """Words with spaces cannot be written in this format; they get underscores."""
    dim = len(next(iter(words.values())))
    parts = [f"{len(words)} {dim}\n".encode()]
    for word, vector in words.items():
        parts.append(word.replace(" ", "_").encode() + b" " + np.array(vector, "<f4").tobytes())
        parts.append(b"\n" if newline else b"")
    return b"".join(parts)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
