"""API keys: hashed at rest, compared in constant time, with scopes."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass

from service.core.errors import Forbidden, Unauthorized
from service.core.settings import Settings

SCOPES = ("read", "write", "admin")
ANONYMOUS = "anonymous"  # who needs no key
OPEN_PATHS = ("/healthz", "/readyz", "/version", "/docs", "/openapi.json", "/")


@dataclass(frozen=True)
class ApiKey:
    """One configured key: its owner's name, the sha256 of the key, and what it may do."""

    name: str
    sha256: str
    scopes: frozenset[str]


def parse_keys(text: str) -> tuple[ApiKey, ...]:
    """`name:sha256:scope+scope, …`; ValueError says which entry is malformed."""
    keys = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        pieces = entry.split(":")
        if len(pieces) != 3 or len(pieces[1]) != 64 or not set(pieces[1].lower()) <= set("0123456789abcdef"):
            raise ValueError(f"UNSEEN_API_KEYS: {pieces[0]!r} is not name:sha256-hex-of-the-key:scopes")
        scopes = frozenset(pieces[2].split("+"))
        if not scopes <= set(SCOPES):
            raise ValueError(f"UNSEEN_API_KEYS: {pieces[0]!r} has unknown scopes; valid are {', '.join(SCOPES)}")
        keys.append(ApiKey(pieces[0], pieces[1].lower(), scopes))
    return tuple(keys)


class Authenticator:
    """Decides who calls and whether they may. Without configured keys everyone may, on loopback only."""

    def __init__(self, settings: Settings) -> None:
        self.keys = parse_keys(settings.api_keys)
        if not self.keys and not _is_loopback(settings.host):
            raise ValueError(
                f"Refusing to listen on {settings.host} without API keys: set UNSEEN_API_KEYS, or listen on 127.0.0.1."
            )

    def check(self, method: str, path: str, authorization: str | None, x_api_key: str | None) -> str:
        """The caller's name; Unauthorized or Forbidden otherwise."""
        if not self.keys or path in OPEN_PATHS or path.startswith("/docs"):
            return ANONYMOUS
        given = x_api_key or _bearer(authorization or "")
        digest = hashlib.sha256(given.encode()).hexdigest()
        # Every key is compared, so that time does not tell which one came close.
        matches = [key for key in self.keys if hmac.compare_digest(key.sha256, digest)]
        if not given or not matches:
            raise Unauthorized("Send a valid API key as 'Authorization: Bearer KEY'.")
        needed = "read" if method in ("GET", "HEAD", "OPTIONS") else "write"
        if not matches[0].scopes & {needed, "admin"}:
            raise Forbidden(f"This API key lacks the scope {needed!r}.")
        return matches[0].name


def _bearer(authorization: str) -> str:
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _is_loopback(host: str) -> bool:
    if host in ("localhost", ""):
        return host == "localhost"
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
