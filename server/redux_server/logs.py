"""Log lines: JSON or text on standard error, one event a line, ids bound by context."""

import logging
import sys
from typing import Any

import structlog


def configure(*, format_: str, level: str) -> None:
    """Set up structlog and route the standard library's loggers through it.

    ``format_`` is ``json`` or ``text``; ``level`` a name such as ``info``.
    """
    renderer: Any = structlog.processors.JSONRenderer()
    if format_ == "text":
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            renderer,
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("redux_server").setLevel(level.upper())
    logging.getLogger("redux_pipelines").setLevel(level.upper())
