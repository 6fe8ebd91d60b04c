"""Readers of class tables: .npz, xlsa17 .mat, .csv, .json. Nothing is ever unpickled."""

from __future__ import annotations

import csv
import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np

from models.errors import EXTRA, InvalidInput
from models.knowledge.names import MAX_NAMES, quote
from models.knowledge.tables import MAX_DIM, ClassTable, TableKind, class_table

MAX_FILE_BYTES = 2 * 2**30
_NAME_KEYS = ("class_names", "allclasses_names", "classes")
_VECTOR_KEYS = ("vectors", "att")
_NAME_HEADERS = frozenset({"", "class", "classes", "class_name", "class name", "name", "label", "category"})
Array = np.ndarray[Any, Any]


def read_class_table(path: Path | str, kind: TableKind, *, filename: str | None = None) -> ClassTable:
    """The table in a .npz, .mat, .csv, .tsv, .txt or .json file; the ending is `filename`'s where given.

    Raises InvalidInput for anything unusable, naming the class, row or key.
    """
    path = Path(path)
    suffix = Path(filename or path.name).suffix.lower()
    readers = {".npz": from_npz, ".mat": from_mat, ".csv": from_csv, ".tsv": from_csv, ".txt": from_csv}
    if suffix != ".json" and suffix not in readers:
        raise InvalidInput(
            f"A class table cannot be read from a {suffix or 'nameless'} file. Use .npz, .mat, .csv or .json."
        )
    if not (n_bytes := path.stat().st_size):
        raise InvalidInput("The file is empty.")
    if n_bytes > MAX_FILE_BYTES:
        raise InvalidInput(f"The file has {n_bytes} bytes; class tables may have {MAX_FILE_BYTES}.")
    return _from_json(path, kind) if suffix == ".json" else readers[suffix](path, kind)


def from_mapping(vectors: Mapping[str, Sequence[float]], kind: TableKind = "class_vectors") -> ClassTable:
    """A table of ``{class name: [numbers]}``."""
    if not vectors:
        raise InvalidInput("The table has no classes.", field="vectors")
    rows: list[Array] = []
    first_name = next(iter(vectors))
    for name, values in vectors.items():
        try:
            row = np.asarray(values)
        except ValueError as error:
            raise InvalidInput(f"The vector of class {quote(name)} is not a list of numbers.") from error
        if row.ndim != 1 or row.dtype.kind not in "fiub" or not row.size:
            raise InvalidInput(f"The vector of class {quote(name)} is not a list of numbers.", field=f"vectors/{name}")
        if rows and row.size != rows[0].size:
            raise InvalidInput(
                f"Class {quote(name)} has {row.size} numbers, class {quote(first_name)} has {rows[0].size}.",
                field=f"vectors/{name}",
            )
        rows.append(row)
    return class_table(kind, list(vectors), np.stack(rows))


def _from_json(path: Path, kind: TableKind) -> ClassTable:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"The file is no JSON: {error}.") from error
    if isinstance(data, dict) and isinstance(data.get("vectors"), dict):
        data = data["vectors"]
    if not isinstance(data, dict):
        raise InvalidInput('A JSON class table is an object {"class name": [numbers]}.')
    return from_mapping(data, kind)


# --- .npz ------------------------------------------------------------------------------------------------------------


def from_npz(path: Path | str, kind: TableKind = "class_vectors") -> ClassTable:
    """Keys `class_names`, `vectors` (n_classes, dim) and optionally `attribute_names`, `attribute_vectors`.

    xlsa17's names are understood too: `allclasses_names`, and `att` (dim, n_classes).
    """
    wanted = {*_NAME_KEYS, *_VECTOR_KEYS, "attribute_names", "attribute_vectors"}
    try:
        with zipfile.ZipFile(path) as archive:
            members = {i.filename.removesuffix(".npy"): i for i in archive.infolist() if i.filename.endswith(".npy")}
            unpacked = sum(info.file_size for key, info in members.items() if key in wanted)
            if unpacked > MAX_FILE_BYTES:
                raise InvalidInput(f"The .npz unpacks to {unpacked} bytes; {MAX_FILE_BYTES} are allowed.")
            arrays = {k: _read_npy(archive.open(i), k, i.file_size) for k, i in members.items() if k in wanted}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InvalidInput(f"The file is no usable .npz archive: {error}.") from error
    return _from_arrays(arrays, kind, found=sorted(members))


def _read_npy(member: IO[bytes], key: str, n_bytes: int) -> Array:
    """One array of an .npz. The header is read first: it must promise no more than the member holds."""
    with member:
        try:
            version = np.lib.format.read_magic(member)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            if read_header is None:
                raise ValueError(f"unknown .npy version {version}")
            shape, fortran_order, dtype = read_header(member)
        except (ValueError, TypeError, SyntaxError, TokenError) as error:  # numpy parses the header as Python text
            raise InvalidInput(f"Array {key!r} of the .npz is damaged: {error}.", field=key) from error
        if dtype.hasobject:
            raise InvalidInput(
                f"Array {key!r} of the .npz holds pickled Python objects, which are never read. Save it with a plain "
                f"type, e.g. np.array({key}, dtype=str).",
                field=key,
            )
        count = int(np.prod(shape, dtype=object)) if shape else 1
        if min(shape, default=1) < 0 or not dtype.itemsize or count * dtype.itemsize > n_bytes:
            raise InvalidInput(
                f"Array {key!r} of the .npz is cut off: shape {shape} does not fit its bytes.", field=key
            )
        data = member.read(count * dtype.itemsize)
        if len(data) < count * dtype.itemsize:
            raise InvalidInput(f"Array {key!r} of the .npz is cut off.", field=key)
        return np.frombuffer(data, dtype, count).reshape(shape, order="F" if fortran_order else "C")


def _from_arrays(arrays: Mapping[str, Array], kind: TableKind, found: Sequence[str]) -> ClassTable:
    """A table of named arrays, of an .npz or a .mat."""
    name_key = next((k for k in _NAME_KEYS if k in arrays), None)
    vector_key = next((k for k in _VECTOR_KEYS if k in arrays), None)
    if name_key is None or vector_key is None:
        lacking = " and ".join(
            text for key, text in ((name_key, "class_names"), (vector_key, "vectors (or att)")) if key is None
        )
        raise InvalidInput(f"The file has no array {lacking}; it has {', '.join(found[:20]) or 'nothing'}.")
    names = _strings(arrays[name_key], name_key)
    vectors = arrays[vector_key]
    if vector_key == "att":
        vectors = _rows_of_att(vectors, len(names))
    labels = arrays.get("attribute_names")
    return class_table(
        kind,
        names,
        vectors,
        None if labels is None else _strings(labels, "attribute_names"),
        arrays.get("attribute_vectors"),
    )


def _strings(array: Array, key: str) -> list[str]:
    """A list of texts from an array of texts, UTF-8 bytes, or MATLAB cells with one text each."""
    texts: list[str] = []
    for item in array.ravel():
        while isinstance(item, np.ndarray) and item.size == 1:
            item = item.ravel()[0]
        if isinstance(item, bytes):
            item = item.decode("utf-8", "replace")
        if not isinstance(item, str):
            raise InvalidInput(f"{key} must hold texts; it holds {type(item).__name__} ({array.dtype}).", field=key)
        texts.append(str(item))
    return texts


def _rows_of_att(att: Array, n_classes: int) -> Array:
    """xlsa17 stores `att` as (dim, n_classes); files written the other way round are recognised by their length."""
    if att.ndim == 2 and att.shape[1] != n_classes and att.shape[0] == n_classes:
        return att
    if att.ndim != 2 or att.shape[1] != n_classes:
        raise InvalidInput(
            f"att has shape {att.shape}, but there are {n_classes} class names: xlsa17 stores (attributes, classes).",
            field="att",
        )
    return att.T


# --- .mat ------------------------------------------------------------------------------------------------------------


def from_mat(path: Path | str, kind: TableKind = "attributes") -> ClassTable:
    """xlsa17's `att_splits.mat` or `sent_splits.mat`: `att` (dim, n_classes) and `allclasses_names`.

    MATLAB 7.3 files need the extra 'hdf5'.
    """
    from scipy.io import loadmat, whosmat

    keys = [*_NAME_KEYS, *_VECTOR_KEYS, "attribute_names", "attribute_vectors"]
    try:
        listed = {name: shape for name, shape, _ in whosmat(path)}
        for key, shape in listed.items():
            if key in keys and int(np.prod(shape, dtype=object)) * 8 > MAX_FILE_BYTES:
                raise InvalidInput(f"{key} of shape {shape} is larger than a class table may be.", field=key)
        arrays = loadmat(path, variable_names=[k for k in keys if k in listed])
    except InvalidInput:
        raise
    except NotImplementedError:  # scipy's answer to MATLAB 7.3
        arrays = _read_hdf5(Path(path), keys)
        listed = dict.fromkeys(arrays)
    except Exception as error:  # scipy raises many kinds on damaged files: TypeError, struct.error, MatReadError, ...
        raise InvalidInput(f"The file is no usable .mat: {type(error).__name__}: {error}.") from error
    return _from_arrays({k: v for k, v in arrays.items() if k in keys}, kind, found=sorted(listed))


def _read_hdf5(path: Path, keys: Sequence[str]) -> dict[str, Array]:
    """MATLAB 7.3: HDF5 with axes reversed; cells are references to arrays of character codes."""
    try:
        import h5py
    except ImportError as error:
        raise InvalidInput(
            f"This is a MATLAB 7.3 file. Install the extra 'hdf5' ({EXTRA.format('hdf5')}), or save it with -v7."
        ) from error
    arrays: dict[str, Array] = {}
    try:
        with h5py.File(path, "r") as file:
            for key in keys:
                node = file.get(key)
                if not isinstance(node, h5py.Dataset):
                    continue
                if node.size * 8 > MAX_FILE_BYTES:
                    raise InvalidInput(f"{key} of shape {node.shape} is larger than a class table may be.", field=key)
                if node.dtype == h5py.ref_dtype:
                    cells = [np.asarray(file[reference]).ravel() for reference in np.asarray(node).ravel()]
                    arrays[key] = np.array(["".join(map(chr, codes)) for codes in cells])
                else:
                    arrays[key] = np.asarray(node).T
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"The MATLAB 7.3 file is damaged: {error}.") from error
    return arrays


# --- .csv ------------------------------------------------------------------------------------------------------------


def from_csv(path: Path | str, kind: TableKind = "attributes") -> ClassTable:
    """One class a row: its name, then numbers, separated by comma, semicolon or tab; a header row names the attributes.

    Quoted fields, a byte-order mark and, beside semicolons, decimal commas are understood.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"The file is no UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t", key=first.count)
    if not first.count(delimiter):
        raise InvalidInput("The first line has no comma, semicolon or tab. Expected: class name, then its numbers.")
    try:
        reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise InvalidInput(f"The file is no usable CSV: {error}.") from error
    header = None if _is_data(rows[0][1], delimiter) else [cell.strip() for cell in rows.pop(0)[1]]
    if not rows:
        raise InvalidInput("The table has a header but no classes.")
    width = len(header or rows[0][1])
    if len(rows) > MAX_NAMES or width > MAX_DIM + 1:
        raise InvalidInput(f"{len(rows)} classes of {width - 1} numbers; {MAX_NAMES} of {MAX_DIM} are allowed.")
    vectors = np.array([_numbers(row, line, width, delimiter, header) for line, row in rows])
    labels = header[1:] if header and kind == "attributes" else None
    return class_table(kind, [row[0] for _, row in rows], vectors, labels)


def _is_data(row: Sequence[str], delimiter: str) -> bool:
    """Whether the first row is a class already. A first cell like 'class' makes it a header, even of numbers."""
    if row[0].strip().casefold() in _NAME_HEADERS:
        return False
    return all(_number(cell, delimiter) is not None for cell in row[1:])


def _numbers(row: Sequence[str], line: int, width: int, delimiter: str, header: Sequence[str] | None) -> list[float]:
    if len(row) != width:
        raise InvalidInput(f"Line {line} ({quote(row[0])}) has {len(row)} cells, {width} are expected.")
    values: list[float] = []
    for column, cell in enumerate(row[1:], 1):
        value = _number(cell, delimiter)
        if value is None:
            title = f" ({quote(header[column])})" if header else ""
            raise InvalidInput(
                f"Line {line} ({quote(row[0])}), column {column + 1}{title} has {quote(cell)} instead of a number."
            )
        values.append(value)
    return values


def _number(cell: str, delimiter: str) -> float | None:
    text = cell.strip()
    if delimiter == ";" and "." not in text:
        text = text.replace(",", ".", 1)
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None
