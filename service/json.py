"""JSON out, fast: orjson, with vectors as float lists or base64 little-endian float32."""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np
import orjson
from fastapi.responses import Response

Encoding = Literal["float", "base64"]
MAX_STORED_BYTES = 65_536


def dumps(value: Any) -> bytes:
    """Compact JSON; numpy arrays and datetimes included. NaN becomes null."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS)


class FastJSON(Response):
    """A response whose content goes through orjson, unvalidated: for bodies that we build ourselves."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content)


def vector_out(raw: bytes, encoding: Encoding) -> Any:
    """A stored vector (little-endian float32 bytes) as a float array or as base64 text."""
    if encoding == "base64":
        return base64.b64encode(raw).decode("ascii")
    return np.frombuffer(raw, dtype="<f4")


def storable_json(value: dict[str, Any]) -> dict[str, Any]:
    """What can be stored and given back as the same JSON: not NaN, lone surrogates, huge integers or depths."""
    try:
        text = orjson.dumps(value)
    except TypeError as error:
        raise ValueError(f"the object cannot be stored: {error}") from None
    if len(text) > MAX_STORED_BYTES:
        raise ValueError(f"the object has {len(text):,} bytes as JSON; at most {MAX_STORED_BYTES:,} are kept")
    if orjson.loads(text) != value or b"\\u0000" in text:
        raise ValueError("the object holds what JSON cannot carry (NaN, infinity or U+0000)")
    return value
