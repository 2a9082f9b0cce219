"""Log lines: JSON or text on standard error, one event a line, ids bound by context."""

import logging
import sys
from typing import Any

import structlog


def configure(*, format_: str, level: str) -> None:
    """Set up structlog and route the standard library's loggers through it.

    ``format_`` is ``json``, ``text`` or ``auto``, which is text for whoever reads along on a
    terminal; ``level`` a name such as ``info``.
    """
    renderer: Any = structlog.processors.JSONRenderer()
    time = structlog.processors.TimeStamper(fmt="iso", utc=True)
    is_terminal = sys.stderr.isatty()
    if format_ == "text" or (format_ == "auto" and is_terminal):
        renderer = structlog.dev.ConsoleRenderer(colors=is_terminal)
    if format_ == "auto" and is_terminal:  # the clock on the wall of whoever reads along
        time = structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        time,
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
