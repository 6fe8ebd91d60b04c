"""Logs: one line an event on stderr, `key=value` or coloured on a terminal; addresses lose their passwords."""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

import structlog

_CHATTY = ("httpx", "alembic", "onnx_ir", "onnxscript")
"""A line for each request within the service, for each start, and for each weight of an exported network."""

_PASSWORD = re.compile(r"(?<=://)[^/@\s]*@")


def redact(text: str) -> str:
    """`text` with the credentials of every URL in it replaced by `***`."""
    return _PASSWORD.sub("***@", text)


def get_logger(name: str) -> Any:
    """A structured logger: `log.info("job_started", job_id=…)`."""
    return structlog.stdlib.get_logger(name)


def configure_logging(level: str = "info") -> None:
    """Sends our logs and those of the libraries to stderr in one format; call once a process."""
    shared: list[Any] = [
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _redact_event,
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    renderer: Any = (
        structlog.dev.ConsoleRenderer()
        if sys.stderr.isatty()
        else structlog.processors.LogfmtRenderer(
            key_order=["timestamp", "level", "logger", "event"], bool_as_flag=False, sort_keys=False
        )
    )
    handler = logging.StreamHandler()
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def _redact_event(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
    return {name: redact(value) if isinstance(value, str) else value for name, value in event.items()}
