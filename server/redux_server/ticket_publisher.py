"""Publishes tickets from a thread of its own, so that no request waits for a broker."""

import threading
from collections.abc import Callable
from typing import Protocol

import structlog

from redux_server import metrics

MOST_AT_ONCE = 64  # workers that can be woken at a time; the others wake by their slow poll
_PAUSE_S = 2.0
_log = structlog.get_logger("redux_server.tickets")


class Office(Protocol):
    """Where tickets are handed in."""

    def send(self) -> None:
        """Publish one."""
        ...

    def waiting(self) -> int:
        """How many nobody has fetched yet."""
        ...


class TicketPublisher:
    """Takes wishes at any time, and fulfils them as far as the broker lets it.

    While the broker is away wishes are dropped, not gathered: when it is back, the reconciler asks
    for as many tickets as are needed then.
    """

    def __init__(self, open_office: Callable[[], Office]) -> None:
        self._open_office = open_office
        self._condition = threading.Condition()
        self._wanted = 0
        self._at_least = 0
        self._is_closing = False
        self._is_away = False
        self._thread = threading.Thread(target=self._run, name="tickets", daemon=True)

    def start(self) -> None:
        """Begin to publish."""
        self._thread.start()

    def add(self) -> None:
        """Ask for one more ticket. Never blocks for longer than it takes to count."""
        with self._condition:
            self._wanted = min(MOST_AT_ONCE, self._wanted + 1)
            self._condition.notify()

    def fill_up_to(self, count: int) -> None:
        """Ask for as many tickets as there are missing to ``count`` in the queue."""
        with self._condition:
            self._at_least = min(MOST_AT_ONCE, max(self._at_least, count))
            self._condition.notify()

    def close(self, *, patience_s: float = 2.0) -> None:
        """Publish what was asked for, if that takes no longer than ``patience_s``, and end."""
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join(patience_s)

    def _run(self) -> None:
        office: Office | None = None
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._wanted or self._at_least or self._is_closing)
                wanted, at_least = self._wanted, self._at_least
                self._wanted = self._at_least = 0
                if self._is_closing and not wanted:
                    return
            try:
                office = office or self._open_office()
                self._publish(office, wanted, at_least)
            except Exception as error:  # whatever a broker's client raises: that is not our end
                metrics.TICKETS.labels("failed").inc(max(wanted, 1))
                self._say_away(error)
                with self._condition:
                    self._condition.wait_for(lambda: self._is_closing, _PAUSE_S)

    def _publish(self, office: Office, wanted: int, at_least: int) -> None:
        missing = at_least - office.waiting() if at_least else 0
        for _ in range(max(wanted, missing)):
            office.send()
            metrics.TICKETS.labels("sent").inc()
        if self._is_away:
            self._is_away = False
            _log.info("the broker is back")

    def _say_away(self, error: Exception) -> None:
        if not self._is_away:  # once, not at every ticket
            self._is_away = True
            reason = f"{type(error).__name__}: {error}"
            _log.warning("the broker is away; workers find tasks by polling", reason=reason)
