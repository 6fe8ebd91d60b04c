"""Class embeddings, and zero-shot classification, for classes you have no pictures of: the Python client.

from unseen import Client
"""

from __future__ import annotations

from importlib import metadata

from service.client import (
    ApiError,
    ClassEmbeddings,
    Client,
    FolderUpload,
    JobFailed,
    ServiceUnreachable,
    UnseenError,
    WaitTimeout,
)

__all__ = [
    "ApiError",
    "ClassEmbeddings",
    "Client",
    "FolderUpload",
    "JobFailed",
    "ServiceUnreachable",
    "UnseenError",
    "WaitTimeout",
    "__version__",
]

try:
    __version__ = metadata.version("unseen")
except metadata.PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0.0.0"
