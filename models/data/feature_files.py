"""Named arrays out of MATLAB (v4 to v7 by scipy, v7.3 by h5py) and NumPy files that nobody vouches for.

Sizes are checked before memory is taken, nothing is unpickled, and MATLAB's cells of text become arrays of `str`.
"""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from models.errors import InvalidInput, nearest_names

Arrays = dict[str, NDArray[Any]]

_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
MAX_ARRAYS = 10_000


def read_mat(
    path: Path, *, required: Sequence[str], optional: Sequence[str] = (), max_bytes: int = 16 * 2**30
) -> Arrays:
    """The named variables of a MATLAB file, shaped as MATLAB shows them.

    InvalidInput if it is no MATLAB file, lacks a required variable, would need more than `max_bytes`, or is v7.3 and
    the optional package h5py is missing.
    """
    with path.open("rb") as file:
        head = file.read(520)
    reader = _read_hdf5 if head.startswith(b"MATLAB 7.3") or _HDF5_MAGIC in (head[:8], head[512:]) else _read_mat5
    try:
        return reader(path, required, optional, max_bytes)
    except (InvalidInput, MemoryError):
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise _unreadable(path, error) from None
    except Exception as error:  # damaged files make scipy and h5py raise nearly anything
        raise _unreadable(path, error) from None


def read_npz(path: Path, *, required: Sequence[str], max_bytes: int = 16 * 2**30) -> Arrays:
    """Every array of an `.npz`. InvalidInput if damaged, too large, without one of `required`, or with objects."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            if len(infos) > MAX_ARRAYS:
                raise InvalidInput(f"{path.name} holds {len(infos):,} arrays; at most {MAX_ARRAYS:,} are allowed.")
            _refuse_large(path, sum(info.file_size for info in infos), max_bytes)
            arrays = {info.filename.removesuffix(".npy"): _read_npy(archive, info) for info in infos}
    except (InvalidInput, MemoryError):
        raise
    except OSError:
        raise
    except Exception as error:  # damaged files make zipfile and numpy raise nearly anything
        raise InvalidInput(f"{path.name} is no readable .npz file ({error}). Save it again with numpy.savez.") from None
    _require(path, arrays, required)
    return arrays


def _read_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(info) as stream:
        version = npy_format.read_magic(stream)
        read_header = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
    if dtype.hasobject:
        raise InvalidInput(f"{info.filename} holds Python objects. Save plain numbers or text (dtype 'U').")
    n_values = 1
    for side in shape:
        n_values *= side
    if n_values * dtype.itemsize > info.file_size:  # numpy would take the memory before it notices
        raise InvalidInput(f"{info.filename} is cut off: its header announces the shape {shape}.")
    with archive.open(info) as stream:
        array: NDArray[Any] = npy_format.read_array(stream, allow_pickle=False)
    return array


def _read_mat5(path: Path, required: Sequence[str], optional: Sequence[str], max_bytes: int) -> Arrays:
    # scipy.io takes a while to import, and the API process only needs the sizes of uploads
    from scipy.io import loadmat, whosmat

    shapes = {name: shape for name, shape, _ in whosmat(path)}
    wanted = [name for name in (*required, *optional) if name in shapes]
    _refuse_large(path, sum(8 * int(np.prod(shapes[name], dtype=object)) for name in wanted), max_bytes)
    _require(path, shapes, required)
    loaded = loadmat(path, variable_names=wanted, mat_dtype=False)
    for name in wanted:
        if not isinstance(loaded[name], np.ndarray):
            raise InvalidInput(f"{path.name}: {name} is sparse or no array. Save it as a full array.", field=name)
    return {name: _texts(loaded[name]) if loaded[name].dtype == object else loaded[name] for name in wanted}


def _texts(cells: NDArray[Any]) -> NDArray[Any]:
    """A cell array of character rows as an array of `str` of the same shape."""
    texts = [str(cell.ravel()[0]) if getattr(cell, "size", 0) else "" for cell in cells.ravel()]
    return np.array(texts, dtype=object).reshape(cells.shape)


def _read_hdf5(path: Path, required: Sequence[str], optional: Sequence[str], max_bytes: int) -> Arrays:
    try:
        h5py = importlib.import_module("h5py")
    except ImportError:
        raise InvalidInput(
            f"{path.name} is a MATLAB v7.3 file, which needs the package h5py. Install the extra 'hdf5', or save the "
            "file with '-v7'."
        ) from None
    with h5py.File(path, "r") as file:
        _require(path, dict.fromkeys(file), required)
        wanted = [name for name in (*required, *optional) if name in file]
        for name in wanted:
            if not isinstance(file[name], h5py.Dataset):
                raise InvalidInput(f"{path.name}: {name} is no array.", field=name)
        _refuse_large(path, sum(8 * int(file[name].size) for name in wanted), max_bytes)
        return {name: _from_hdf5(file, file[name][()], h5py.Reference) for name in wanted}


def _from_hdf5(file: Any, values: Any, reference: type) -> NDArray[Any]:
    """HDF5 keeps MATLAB's arrays transposed, and cells as references to arrays of UTF-16 codes."""
    array = np.asarray(values)
    if array.dtype != object:
        return array.T
    texts = []
    for cell in array.T.ravel():
        if not isinstance(cell, reference):
            raise InvalidInput("A cell array holds something other than text.")
        texts.append(np.asarray(file[cell][()]).T.ravel().astype("<u2").tobytes().decode("utf-16-le"))
    return np.array(texts, dtype=object).reshape(array.T.shape)


def _require(path: Path, present: dict[str, Any], required: Sequence[str]) -> None:
    for name in required:
        if name not in present:
            near = nearest_names(name, list(present))
            hint = (
                f" Did you mean {near[0]!r}?" if near else f" It holds: {', '.join(sorted(present)[:20]) or 'nothing'}."
            )
            raise InvalidInput(f"{path.name} has no variable {name!r}.{hint}", field=name)


def _refuse_large(path: Path, n_bytes: int, max_bytes: int) -> None:
    if n_bytes > max_bytes:
        raise InvalidInput(f"{path.name} would need {n_bytes:,} bytes of memory; at most {max_bytes:,} are allowed.")


def _unreadable(path: Path, error: Exception) -> InvalidInput:
    reason = str(error)[:200] or type(error).__name__
    return InvalidInput(f"{path.name} is no readable MATLAB file ({reason}). Save it again with '-v7'.")
