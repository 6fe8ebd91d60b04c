"""Streaming readers of word-vector files: GloVe text, fastText ``.vec`` text, word2vec binary, each also gzipped.

Blocks of (tokens, vectors) come out one after the other, so that memory stays at a few blocks however large the file.
Lines of text that are no word vector are skipped and counted; a file of which more than `SKIPPED_SHARE` is skipped,
one that is cut off, and one whose header does not match are refused (InvalidInput).
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, cast

import numpy as np

from models.errors import InvalidInput
from models.knowledge.base import Vectors

SKIPPED_SHARE = 0.001
_BLOCK_BYTES = 4 * 2**20
_MAX_LINE_BYTES = 8 * 2**20
_MAX_TOKEN_BYTES = 1000
_MAX_SKIPPED = 100_000
_N_EXAMPLES = 10
_NOT_WORD_VECTORS: tuple[tuple[bytes | tuple[bytes, ...], str], ...] = (
    (b"PK\x03\x04", "a zip archive: unpack it, or send .npz tables as class_vectors or attributes"),
    (b"\xba\x16\x4f\x2f", "a fastText model (.bin): send the .vec file of the same download"),
    (
        (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        "a Python pickle, which is never read: export it as word2vec text or binary",
    ),
    (b"\x89HDF", "an HDF5 file: export it as text"),
    (b"\x93NUMPY", "a bare .npy array: it has no words; send an .npz with class_names and vectors"),
    (b"\xff\xfe", "UTF-16 text: save it as UTF-8"),
    (b"%PDF", "a PDF"),
    (b"\x1f\x8b", "compressed twice: unpack it once"),
)

Block = tuple[list[str], Vectors]
"""Tokens and their vectors (n, dim) float32, all finite."""


@dataclass(frozen=True)
class VectorFileLimits:
    """What a word-vector file may contain. Bytes are counted after decompression."""

    max_tokens: int = 20_000_000
    max_dim: int = 65_536
    max_bytes: int = 100 * 2**30


@dataclass
class Skipped:
    """Lines that were left out: how many, and the first few with their reason."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, reason: str) -> None:
        """One more; InvalidInput when there are hopelessly many."""
        self.count += 1
        if len(self.examples) < _N_EXAMPLES:
            self.examples.append(reason)
        if self.count > _MAX_SKIPPED:
            raise InvalidInput(f"More than {_MAX_SKIPPED} lines are no word vectors; the first: {self.text()}.")

    def text(self) -> str:
        """The examples in one line."""
        return "; ".join(self.examples[:3])


class WordVectorFile:
    """One open file. `format` is 'text' (no header), 'text with header' or 'word2vec binary'; `dim` is known at once.

    Use as a context manager and iterate over `blocks()` once; then `n_rows` and `skipped` are final.
    """

    def __init__(self, path: Path, limits: VectorFileLimits | None = None) -> None:
        self.limits = limits or VectorFileLimits()
        self.skipped = Skipped()
        self.n_rows = 0
        self.announced: int | None = None
        self.total_bytes = path.stat().st_size
        self._raw: IO[bytes] = path.open("rb")
        try:
            self._stream: IO[bytes] = self._raw
            if self._raw.read(2) == b"\x1f\x8b":
                self._stream = cast(IO[bytes], gzip.GzipFile(fileobj=self._raw, mode="rb"))
            self._raw.seek(0)
            self._n_read = 0
            self._head = self._read()
            self.format, self.dim = self._detect()
        except BaseException:
            self._raw.close()
            raise

    def __enter__(self) -> WordVectorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not self._raw:
            self._stream.close()
        self._raw.close()

    @property
    def position(self) -> int:
        """Bytes of the file read so far, of `total_bytes`."""
        return self._raw.tell()

    def blocks(self) -> Iterator[Block]:
        """All word vectors in order. Raises InvalidInput at the end if the file turns out unusable."""
        source = self._binary_blocks() if self.format == "word2vec binary" else self._text_blocks()
        for tokens, vectors in source:
            self.n_rows += len(tokens)
            if self.n_rows > self.limits.max_tokens:
                raise InvalidInput(f"The file has more than the {self.limits.max_tokens} words that are allowed.")
            if tokens:
                yield tokens, vectors
        self._check_end()

    # --- reading -----------------------------------------------------------------------------------------------------

    def _read(self) -> bytes:
        """The next bytes, b'' at the end."""
        try:
            data = self._stream.read(_BLOCK_BYTES)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InvalidInput(
                f"The gzip file is cut off or damaged after {self._n_read} unpacked bytes ({error}). Send it again."
            ) from error
        self._n_read += len(data)
        if self._n_read > self.limits.max_bytes:
            raise InvalidInput(f"The file is larger than the {self.limits.max_bytes} unpacked bytes that are allowed.")
        return data

    def _detect(self) -> tuple[str, int]:
        """Format and dimension, from the first block."""
        head = self._head
        if not head.strip():
            raise InvalidInput("The word-vector file is empty.")
        for magic, what in _NOT_WORD_VECTORS:
            if head.startswith(magic):
                raise InvalidInput(f"This is no word-vector file but {what}.")
        first, _, rest = head.partition(b"\n")
        header = re.fullmatch(rb"\s*(\d{1,12})\s+(\d{1,9})\s*", first.removeprefix(b"\xef\xbb\xbf"))
        if header and not (_looks_textual(rest) and len(rest.partition(b"\n")[0].split()) == 2 and header[2] != b"1"):
            self.announced, dim = int(header[1]), int(header[2])
            self._head = rest
            kind = "text with header" if _looks_textual(rest) else "word2vec binary"
            if kind == "text with header":
                self._check_header(dim, rest)
        else:
            dim, kind = _majority_dim(head), "text"
        if not 1 <= dim <= self.limits.max_dim:
            raise InvalidInput(
                f"Vectors of {dim} numbers; between 1 and {self.limits.max_dim} are allowed. Each line must be a word "
                f"followed by its numbers, separated by spaces."
            )
        if (self.announced or 0) > self.limits.max_tokens:
            raise InvalidInput(f"The header announces {self.announced} words; {self.limits.max_tokens} are allowed.")
        return kind, dim

    def _check_header(self, dim: int, rest: bytes) -> None:
        if rest.strip() and (found := _majority_dim(rest)) != dim:
            raise InvalidInput(f"The header (line 1) announces {dim} dimensions, but the lines have {found} numbers.")

    def _check_end(self) -> None:
        """The whole file against its header, and how much was skipped."""
        n_lines = self.n_rows + self.skipped.count
        if self.announced is not None and n_lines != self.announced:
            raise InvalidInput(
                f"The header (line 1) announces {self.announced} words, but the file has {n_lines}: an incomplete "
                f"download? If it was shortened on purpose, correct line 1 to '{n_lines} {self.dim}'."
            )
        if self.skipped.count > n_lines * SKIPPED_SHARE:
            raise InvalidInput(
                f"{self.skipped.count} of {n_lines} entries are no word vectors: {self.skipped.text()}. Each line must "
                f"be a word followed by {self.dim} numbers, separated by spaces."
            )
        if self.n_rows == 0:
            raise InvalidInput("The word-vector file has a header but no words.")

    # --- text --------------------------------------------------------------------------------------------------------

    def _text_blocks(self) -> Iterator[Block]:
        line_number = 1 if self.announced is None else 2
        carry, data = b"", self._head.removeprefix(b"\xef\xbb\xbf")
        while data:
            lines = (carry + data).split(b"\n")
            carry = lines.pop()
            if len(carry) > _MAX_LINE_BYTES:
                raise InvalidInput(f"Line {line_number + len(lines)} is longer than {_MAX_LINE_BYTES} bytes.")
            yield self._parse(lines, line_number)
            line_number += len(lines)
            data = self._read()
        if carry:
            yield self._parse([carry], line_number)

    def _parse(self, lines: list[bytes], first_line: int) -> Block:
        """Fast path: every line is fine. Otherwise line by line, to tell which is not."""
        dim = self.dim
        words: list[bytes] = []
        numbers: list[bytes] = []
        for line in lines:
            line = line.rstrip(b" \r")
            word, _, rest = line.partition(b" ")
            if not word or not rest or rest.count(b" ") != dim - 1 or b"  " in rest or len(word) > _MAX_TOKEN_BYTES:
                return self._parse_slowly(lines, first_line)
            words.append(word)
            numbers.append(rest)
        try:
            flat = np.fromstring(b" ".join(numbers), dtype=np.float32, sep=" ")
            tokens = b"\n".join(words).decode("utf-8").split("\n") if words else []
        except ValueError:  # no number, or no UTF-8
            return self._parse_slowly(lines, first_line)
        if flat.size != len(words) * dim or not np.isfinite(flat).all():
            return self._parse_slowly(lines, first_line)
        return tokens, flat.reshape(len(words), dim)

    def _parse_slowly(self, lines: list[bytes], first_line: int) -> Block:
        tokens: list[str] = []
        vectors: list[Vectors] = []
        for number, line in enumerate(lines, first_line):
            if not line.strip():
                continue
            parsed = _parse_line(line, self.dim)
            if isinstance(parsed, str):
                self.skipped.add(f"line {number} {parsed}")
            else:
                tokens.append(parsed[0])
                vectors.append(parsed[1])
        return tokens, np.stack(vectors) if vectors else np.empty((0, self.dim), np.float32)

    # --- word2vec binary ---------------------------------------------------------------------------------------------

    def _binary_blocks(self) -> Iterator[Block]:
        """Each entry: word, one space, `dim` little-endian float32; some writers add a newline after each."""
        assert self.announced is not None
        buffer, done = self._head, 0
        while done < self.announced:
            words, pieces, used = _cut_entries(buffer, 4 * self.dim, self.announced - done)
            done += len(words)
            if words:
                yield self._finish_binary(words, pieces, done - len(words))
            buffer = buffer[used:]
            if done == self.announced:
                break
            if len(buffer) > 4 * self.dim + _MAX_TOKEN_BYTES + _BLOCK_BYTES:
                raise InvalidInput(f"Word {done + 1} has no end within {len(buffer)} bytes: no word2vec binary file?")
            if not (data := self._read()):
                raise InvalidInput(
                    f"The file is cut off: the header announces {self.announced} words of {self.dim} numbers, but it "
                    f"ends at byte {self._n_read}, within word {done + 1}. Send it again."
                )
            buffer += data
        if buffer.strip() or self._read().strip():
            raise InvalidInput(
                f"The file goes on after the {self.announced} words of {self.dim} numbers that its header announces."
            )

    def _finish_binary(self, words: list[bytes], pieces: list[bytes], n_before: int) -> Block:
        vectors = np.frombuffer(b"".join(pieces), dtype="<f4").reshape(len(words), self.dim)
        tokens: list[str] = []
        keep: list[int] = []
        finite = np.isfinite(vectors).all(axis=1)
        for i, word in enumerate(words):
            token = _decode(word)
            if token is None or not finite[i]:
                reason = "is no UTF-8 word" if token is None else "has a NaN or infinite number"
                self.skipped.add(f"word {n_before + i + 1} {reason}")
            else:
                tokens.append(token)
                keep.append(i)
        return tokens, vectors if len(keep) == len(words) else vectors[keep]


def _looks_textual(data: bytes) -> bool:
    """Whether what follows the first word is a written-out number, and no control characters come near it."""
    after_word = data.lstrip(b"\n")[:4096].partition(b" ")[2][:200]
    return re.match(rb"(\s|[-+.0-9eEnaif]+(\s|$)|$)[^\x00-\x08\x0b\x0c\x0e-\x1f]*$", after_word) is not None


def _majority_dim(head: bytes) -> int:
    """Numbers per line, by majority of the first lines (single words may contain spaces, single lines be damaged)."""
    lines = head.split(b"\n", 200)
    if len(lines) > 1:
        lines = lines[:-1]
    counts = Counter(len(line.split()) - 1 for line in lines if line.strip())
    return max(counts, key=lambda n: (counts[n], -n))


def _parse_line(line: bytes, dim: int) -> tuple[str, Vectors] | str:
    """(token, vector), or what is wrong with the line."""
    fields = line.split()  # words may contain spaces (GloVe 840B has '. . .'), so the numbers are the last fields
    if len(fields) < dim + 1:
        return f"has {len(fields) - 1} numbers where {dim} are expected"
    token = _decode(b" ".join(fields[:-dim]))
    if token is None:
        return "has a word that is no UTF-8, or too long"
    if len(fields) > dim + 1 and all(_is_number(f) for f in fields[1:-dim]):
        return f"has {len(fields) - 1} numbers where {dim} are expected"
    for text in fields[-dim:]:
        if not _is_number(text):
            return f"has {text[:20].decode('utf-8', 'replace')!r} where a number is expected"
    with np.errstate(over="ignore"):
        vector = np.array([float(text) for text in fields[-dim:]]).astype(np.float32)
    return (token, vector) if np.isfinite(vector).all() else "has a NaN or infinite number"


def _decode(word: bytes) -> str | None:
    """The word, or None if it is empty, too long or no UTF-8."""
    if not 0 < len(word) <= _MAX_TOKEN_BYTES:
        return None
    try:
        return word.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _is_number(text: bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return b"_" not in text


def _cut_entries(buffer: bytes, width: int, limit: int) -> tuple[list[bytes], list[bytes], int]:
    """Whole entries at the start of `buffer`, at most `limit`: (words, vectors as bytes, bytes used)."""
    words: list[bytes] = []
    pieces: list[bytes] = []
    used = 0
    while len(words) < limit:
        space = buffer.find(b" ", used)
        end = space + 1 + width
        if space < 0 or end > len(buffer):
            break
        words.append(buffer[used:space].lstrip(b"\n"))
        pieces.append(buffer[space + 1 : end])
        used = end
    return words, pieces, used
