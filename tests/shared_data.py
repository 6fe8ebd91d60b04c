"""Where the optional real data lies, and the skip when it is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared_path(*parts: str) -> Path:
    """A file or folder of the real data beside the checkout; skips the calling test where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs the optional real data ../shared/{'/'.join(parts)}, which is not beside this checkout")
    return path
