"""PostgreSQL as the database of several machines: what a connection may cost, and for how long.

Every wait has an end, so that a database that is away shows as an error which callers know, within
seconds. Knows no table.
"""

from typing import Any

from sqlalchemy import URL, Engine, create_engine

POOL_SIZE = 5
POOL_OVERFLOW = 10
# libpq's parameters; a URL may set its own (?connect_timeout=10). Seconds, but for milliseconds in
# tcp_user_timeout and in options.
_TIMEOUTS: dict[str, Any] = {
    "application_name": "flux-redux",
    "connect_timeout": 4,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "options": "-c statement_timeout=20000 -c lock_timeout=10000"
    " -c idle_in_transaction_session_timeout=60000",
}


def create(url: URL) -> Engine:
    """An engine for ``url``, a ``postgresql+psycopg`` one.

    A connection is tried before it is used (``pool_pre_ping``), so that a restarted database costs
    a reconnection and no error.

    Raises:
        ImportError: psycopg is not installed.
    """
    given = {name: value for name, value in _TIMEOUTS.items() if name not in url.query}
    return create_engine(
        url,
        connect_args=given,
        hide_parameters=True,  # errors are logged, and parameters are prompts
        pool_pre_ping=True,
        pool_size=POOL_SIZE,
        max_overflow=POOL_OVERFLOW,
        pool_timeout=10.0,
        pool_recycle=1800,
    )
