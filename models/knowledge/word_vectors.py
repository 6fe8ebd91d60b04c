"""Word vectors of several GB, indexed once and then looked up without loading them.

`build` turns a word-vector file into a directory of three plain files:

    vectors.npy     (n_rows, dim) float32, memory-mapped when read
    tokens.sqlite   every token, its comparable spelling and its row
    manifest.json   dimensions, counts, what was skipped
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from models.base import OnProgress, Progress, ignore_progress
from models.errors import InvalidInput
from models.knowledge.base import Lookup, Resolution, Vectors
from models.knowledge.names import normalize_class_name
from models.knowledge.resolution import resolve
from models.knowledge.word_vector_files import VectorFileLimits, WordVectorFile

VECTORS_FILE = "vectors.npy"
TOKENS_FILE = "tokens.sqlite"
MANIFEST_FILE = "manifest.json"
INDEX_FILES = (VECTORS_FILE, TOKENS_FILE, MANIFEST_FILE)

_FORMAT = "unseen word vectors 1"
_NPY_HEADER_BYTES = 128
_FREQUENT_ROWS = 300_000  # suggestions come from these; rarer tokens of the usual files are mostly misspellings
_MAX_SUGGESTED_NAMES = 50  # suggestions cost milliseconds each


@dataclass(frozen=True)
class IndexManifest:
    """What `build` found in the file. Where a token occurs twice, its first vector counts."""

    format: str
    source_format: str
    dim: int
    n_rows: int
    n_tokens: int
    n_duplicates: int
    n_skipped: int
    skipped_examples: tuple[str, ...]


class WordVectorIndex:
    """An index directory, ready for lookups from any thread. Use `build` once, then `open`."""

    kind = "word_vectors"

    def __init__(self, directory: Path, manifest: IndexManifest, vectors: Vectors) -> None:
        self.directory = directory
        self.manifest = manifest
        self._vectors = vectors

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.manifest.dim

    @classmethod
    def build(
        cls,
        source: Path | str,
        directory: Path | str,
        *,
        on_progress: OnProgress = ignore_progress,
        limits: VectorFileLimits | None = None,
    ) -> WordVectorIndex:
        """Index the file `source` (GloVe or fastText text, word2vec binary, each also gzipped) into `directory`.

        `directory` must not exist; it appears complete or not at all, also when `on_progress` raises.
        Progress counts the bytes of `source`. Raises InvalidInput, naming the line, for unusable files.
        """
        directory = Path(directory)
        if directory.exists():
            raise FileExistsError(f"{directory} exists already; build into a new directory.")
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        try:
            with WordVectorFile(Path(source), limits) as file:
                _write_index(file, aside, on_progress)
            for name in INDEX_FILES:
                _sync(aside / name)
            aside.rename(directory)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        _sync(directory.parent)
        return cls.open(directory)

    @classmethod
    def open(cls, directory: Path | str) -> WordVectorIndex:
        """The index in `directory`; vectors stay on disk. InvalidInput if files are missing or do not match."""
        directory = Path(directory)
        try:
            manifest = _read_manifest(directory / MANIFEST_FILE)
            vectors = np.load(directory / VECTORS_FILE, mmap_mode="r", allow_pickle=False)
            if not (directory / TOKENS_FILE).is_file():
                raise ValueError(f"{TOKENS_FILE} is missing")
            if vectors.shape != (manifest.n_rows, manifest.dim) or vectors.dtype != np.float32:
                raise ValueError(f"{VECTORS_FILE} is {vectors.dtype} {vectors.shape}")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InvalidInput(f"No usable word-vector index ({error}). Build it again from the file.") from error
        return cls(directory, manifest, vectors)

    def lookup(self, names: Sequence[str]) -> Lookup:
        """Vectors (n_names, dim) of class names: the whole name's, or the plain mean of its words' vectors.

        Names that do not resolve keep a zero row; the first of them get suggestions.
        """
        vectors = np.zeros((len(names), self.dim), np.float32)
        resolutions: list[Resolution] = []
        n_suggested = 0
        with closing(_connect_read_only(self.directory / TOKENS_FILE)) as connection:
            vocabulary = _SqliteVocabulary(connection)
            for i, name in enumerate(names):
                resolution, rows = resolve(name, vocabulary, suggest=n_suggested < _MAX_SUGGESTED_NAMES)
                n_suggested += bool(resolution.missing_tokens)
                if rows:
                    vectors[i] = self._vectors[list(rows)].mean(axis=0, dtype=np.float64)
                    if not vectors[i].any():
                        resolution = Resolution(name, False, "not found", missing_tokens=resolution.tokens)
                resolutions.append(resolution)
        return Lookup(tuple(names), vectors, tuple(resolutions))


class _SqliteVocabulary:
    """`resolution.Vocabulary` over tokens.sqlite; remembers answers, since class names share words."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._exact: dict[str, int | None] = {}
        self._spelled: dict[str, tuple[str, int] | None] = {}

    def exact(self, token: str) -> int | None:
        if token not in self._exact:
            found = self._row("SELECT row FROM tokens WHERE token = ? ORDER BY row LIMIT 1", token)
            self._exact[token] = None if found is None else int(found[0])
        return self._exact[token]

    def spelled(self, key: str) -> tuple[str, int] | None:
        if key not in self._spelled:
            found = self._row("SELECT token, row FROM tokens WHERE key = ? ORDER BY row LIMIT 1", key)
            self._spelled[key] = None if found is None else (str(found[0]), int(found[1]))
        return self._spelled[key]

    def starting_with(self, prefix: str, min_length: int, max_length: int) -> Sequence[str]:
        query = (
            "SELECT key FROM tokens WHERE key >= ? AND key < ? AND row < ? AND length(key) BETWEEN ? AND ? "
            "GROUP BY key ORDER BY min(row) LIMIT 2000"
        )
        bounds = (prefix, prefix + "\U0010ffff", _FREQUENT_ROWS, min_length, max_length)
        return [str(row[0]) for row in self._rows(query, *bounds)]

    def _row(self, query: str, text: str) -> tuple[Any, ...] | None:
        return next(iter(self._rows(query, text)), None)

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            return self._connection.execute(query, values).fetchall()
        except UnicodeEncodeError:  # a lone surrogate cannot be in the file either
            return []


# --- building --------------------------------------------------------------------------------------------------------


def _write_index(file: WordVectorFile, directory: Path, on_progress: OnProgress) -> None:
    """Stream `file` into the three files of an index."""
    on_progress(Progress("index", 0, file.total_bytes))
    with _bulk_connection(directory / TOKENS_FILE) as connection, (directory / VECTORS_FILE).open("wb") as out:
        _write_npy_header(out, 0, file.dim)
        n_rows = 0
        for tokens, vectors in file.blocks():
            keyed = ((row, token, normalize_class_name(token)) for row, token in enumerate(tokens, n_rows))
            connection.executemany("INSERT INTO tokens VALUES (?, ?, ?)", keyed)
            out.write(np.ascontiguousarray(vectors, dtype="<f4").data)
            n_rows += len(tokens)
            on_progress(Progress("index", file.position, file.total_bytes, {"words": n_rows}))
        out.seek(0)
        _write_npy_header(out, n_rows, file.dim)
        connection.execute("CREATE INDEX by_token ON tokens (token)")
        connection.execute("CREATE INDEX by_key ON tokens (key)")
        (n_tokens,) = connection.execute("SELECT count(DISTINCT token) FROM tokens").fetchone()
        connection.commit()
    manifest = IndexManifest(
        format=_FORMAT,
        source_format=file.format,
        dim=file.dim,
        n_rows=n_rows,
        n_tokens=n_tokens,
        n_duplicates=n_rows - n_tokens,
        n_skipped=file.skipped.count,
        skipped_examples=tuple(file.skipped.examples),
    )
    (directory / MANIFEST_FILE).write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")


@contextmanager
def _bulk_connection(path: Path) -> Iterator[sqlite3.Connection]:
    """A new token table. No journal: a build that does not end well is thrown away whole."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA cache_size = -65536")
        connection.execute("CREATE TABLE tokens (row INTEGER PRIMARY KEY, token TEXT NOT NULL, key TEXT NOT NULL)")
        yield connection


def _write_npy_header(out: IO[bytes], n_rows: int, dim: int) -> None:
    """An .npy header of fixed length, so that the row count can be filled in at the end."""
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": (n_rows, dim)})
    if out.tell() != _NPY_HEADER_BYTES:
        raise RuntimeError(f"numpy wrote an .npy header of {out.tell()} bytes, {_NPY_HEADER_BYTES} were expected")


def _read_manifest(path: Path) -> IndexManifest:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise ValueError(f"{MANIFEST_FILE} is not of format {_FORMAT!r}")
    values["skipped_examples"] = tuple(values["skipped_examples"])
    return IndexManifest(**values)


def _connect_read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)


def _sync(path: Path) -> None:
    """Force a file or directory entry to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
