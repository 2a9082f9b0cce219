"""Replaces tickets that were lost: asks the database what should have been claimed by now.

Runs in every API node; they take turns, so that their number does not multiply the tickets.
"""

from collections.abc import Callable

from redux_server.duties import Duties
from redux_server.presence import Presence, WorkerState
from redux_server.store import TaskStore
from redux_server.ticket_publisher import MOST_AT_ONCE

EVERY_S = 3.0
PATIENCE_S = 3.0  # how long a task may wait before it looks forgotten
_DUTY = "tickets"


class Reconciler:
    """Compares what waits with what was announced.

    ``fill_up_to`` makes sure of so many tickets in the queue, those that are there counted.
    """

    def __init__(
        self,
        store: TaskStore,
        presence: Presence,
        duties: Duties,
        fill_up_to: Callable[[int], None],
    ) -> None:
        self._store = store
        self._presence = presence
        self._duties = duties
        self._fill_up_to = fill_up_to

    def tick(self) -> int:
        """Ask for tickets where they are missing; returns for how many tasks."""
        if not self._duties.take(_DUTY, every_s=EVERY_S):
            return 0
        due = self._store.due(waiting_s=PATIENCE_S, limit=MOST_AT_ONCE)
        if due:
            # A ticket more than there are workers wakes nobody.
            workers = sum(each.state is WorkerState.READY for each in self._presence.all())
            self._fill_up_to(min(due, max(1, workers)))
        return due
