"""Embedding sets as files: npz, mat (xlsa17), csv, parquet, safetensors."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import scipy.io
from safetensors.numpy import save as save_safetensors

from models.errors import EXTRA
from service.core.errors import UnsupportedMedia
from service.core.tables import EmbeddingClass, EmbeddingSet

ExportFormat = Literal["npz", "mat", "csv", "parquet", "safetensors"]


@dataclass(frozen=True)
class Table:
    """All vectors of a set: (n_classes, dim) float32, names, seen flags, and what the set is."""

    names: list[str]
    seen: np.ndarray[Any, np.dtype[np.bool_]]
    vectors: np.ndarray[Any, np.dtype[np.float32]]
    about: dict[str, Any]
    splits: dict[str, np.ndarray[Any, Any]]


def _npz(table: Table) -> bytes:
    out = io.BytesIO()
    np.savez(
        out,
        class_names=np.array(table.names),
        vectors=table.vectors,
        seen=table.seen,
        about=np.array(json.dumps(table.about)),
    )
    return out.getvalue()


def _mat(table: Table) -> bytes:
    """xlsa17's layout: `att` (dim, n_classes) with unit columns, names as a column of cells, 1-based class numbers."""
    vectors = table.vectors.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    names = np.empty((len(table.names), 1), dtype=object)
    names[:, 0] = table.names
    numbers = np.arange(1, len(table.names) + 1, dtype=np.float64)[:, None]
    out = io.BytesIO()
    scipy.io.savemat(
        out,
        {
            "att": (vectors / np.where(norms > 0, norms, 1)).T,
            "original_att": vectors.T,
            "allclasses_names": names,
            "seen_classes": numbers[table.seen],
            "unseen_classes": numbers[~table.seen],
            **{name: _column(values) for name, values in table.splits.items()},
        },
        do_compression=True,
    )
    return out.getvalue()


def _column(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """MATLAB's column: cells for text, doubles for numbers."""
    if values.dtype.kind == "U":
        cells = np.empty((len(values), 1), dtype=object)
        cells[:, 0] = [str(value) for value in values]
        return cells
    return values.astype(np.float64)[:, None]


def _csv(table: Table) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["class_name", "seen", *(f"v{i}" for i in range(table.vectors.shape[1]))])
    for name, seen, vector in zip(table.names, table.seen, table.vectors, strict=True):
        writer.writerow([name, "true" if seen else "false", *(repr(float(x)) for x in vector)])
    return out.getvalue().encode("utf-8")


def _parquet(table: Table) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UnsupportedMedia(f"Parquet needs the server's extra: {EXTRA.format('parquet')}") from None
    columns = {
        "class_name": pyarrow.array(table.names),
        "seen": pyarrow.array(table.seen),
        "embedding": pyarrow.FixedSizeListArray.from_arrays(
            pyarrow.array(table.vectors.ravel()), table.vectors.shape[1]
        ),
    }
    out = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table(columns).replace_schema_metadata({"unseen": json.dumps(table.about)}), out
    )
    return out.getvalue()


def _safetensors(table: Table) -> bytes:
    metadata = {"class_names": json.dumps(table.names), "about": json.dumps(table.about)}
    return save_safetensors({"vectors": table.vectors, "seen": table.seen}, metadata=metadata)


@dataclass(frozen=True)
class Exporter:
    """How one format is written."""

    media_type: str
    write: Callable[[Table], bytes]


EXPORTERS: dict[str, Exporter] = {
    "npz": Exporter("application/x-npz", _npz),
    "mat": Exporter("application/x-matlab-data", _mat),
    "csv": Exporter("text/csv", _csv),
    "parquet": Exporter("application/vnd.apache.parquet", _parquet),
    "safetensors": Exporter("application/x-safetensors", _safetensors),
}
assert set(EXPORTERS) == set(get_args(ExportFormat))


def export_rows(
    format_name: ExportFormat, row: EmbeddingSet, classes: Sequence[EmbeddingClass], splits: bytes | None
) -> bytes:
    """The file's bytes. `splits` is the .npz of 1-based image rows that the set's job wrote, for `mat`."""
    about = {
        "id": row.id,
        "name": row.name,
        "method": row.method,
        "relation": row.summary.get("relation"),
        "version": row.version,
    }
    table = Table(
        names=[c.name for c in classes],
        seen=np.array([c.is_seen for c in classes], dtype=np.bool_),
        vectors=np.stack([np.frombuffer(c.vector, dtype="<f4") for c in classes]).astype(np.float32),
        about=about,
        splits=_read_splits(splits),
    )
    return EXPORTERS[format_name].write(table)


def _read_splits(splits: bytes | None) -> dict[str, np.ndarray[Any, Any]]:
    if splits is None:
        return {}
    with np.load(io.BytesIO(splits), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
