"""Delivers what is in the outbox of webhooks, in threads of the API process.

One thread looks for deliveries that are due and claims them; each try runs in a thread of its own,
since receivers may be slow. Knows when to try and what to write down, not how a try is made.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
from sqlalchemy.exc import SQLAlchemyError

from redux_server import metrics
from redux_server.net.guard import FetchError
from redux_server.webhooks.delivery import TaskGone
from redux_server.webhooks.outbox import Delivery, Outbox, retry_pause_s

_CATCH_UP_EVERY_S = 30.0
_log = structlog.get_logger("redux_server.webhooks.sender")


@dataclass(frozen=True, slots=True)
class Limits:
    """How many tries run at once: in all, to one host, for one key.

    Slow receivers hold what one host or one key may have, and leave the rest to the others.
    """

    in_all: int = 32
    per_host: int = 8
    per_key: int = 24


class WebhookSender:
    """Works on an outbox from ``start`` to ``stop``.

    Args:
        outbox: what to deliver.
        deliver: makes one try; raises ``FetchError`` for a failed one, ``TaskGone`` for none.
        limits: how many at once.
        pause_s: seconds from the n-th failed try to the next, None to give up.
        poll_s: seconds between looks at an outbox in which nothing was due.
    """

    def __init__(
        self,
        outbox: Outbox,
        deliver: Callable[[Delivery], None],
        *,
        limits: Limits | None = None,
        pause_s: Callable[[int], float | None] = retry_pause_s,
        poll_s: float = 1.0,
    ) -> None:
        self._outbox = outbox
        self._deliver = deliver
        self._limits = limits or Limits()
        self._pause_s = pause_s
        self._poll_s = poll_s
        self._lock = threading.Lock()
        self._in_flight: set[Delivery] = set()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start looking for deliveries."""
        # Daemons, all of them: a receiver that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)
        self._thread.start()

    def stop(self, *, grace_s: float = 5.0) -> None:
        """Start no more tries, and wait ``grace_s`` for those that run.

        A try that is left behind counts as cut short: it is made again, here or elsewhere.
        """
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        ends_at = time.monotonic() + grace_s
        while self._running() and time.monotonic() < ends_at:
            time.sleep(0.02)

    def _run(self) -> None:
        caught_up_at = -math.inf
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                if time.monotonic() - caught_up_at > _CATCH_UP_EVERY_S:
                    caught_up_at = time.monotonic()
                    self._outbox.catch_up()
                started = self._start_due()
            except Exception as error:  # a database that is away now will be back
                _log.error("webhooks cannot be sent right now", exc_info=error)
                started = 0
            if not started:
                self._wake.wait(self._poll_s)

    def _start_due(self) -> int:
        """Claim what is due and may run now, and start it; returns how many."""
        running = self._running()
        room = self._limits.in_all - len(running)
        if room <= 0:
            return 0
        hosts = Counter(one.callback.origin for one in running)
        keys = Counter(one.key_id for one in running)
        found = self._outbox.due(
            4 * self._limits.in_all,
            but_not_to=_full(hosts, self._limits.per_host),
            but_not_of=_full(keys, self._limits.per_key),
        )
        chosen = self._choose(found, room, hosts, keys)
        claimed = self._outbox.claim(chosen) if chosen else []
        for delivery in claimed:
            self._start(delivery)
        return len(claimed)

    def _start(self, delivery: Delivery) -> None:
        with self._lock:
            self._in_flight.add(delivery)
        thread = threading.Thread(target=self._try, args=(delivery,), name="webhook", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads: the claim runs out, and it is tried again
            self._done(delivery)
            raise

    def _done(self, delivery: Delivery) -> None:
        with self._lock:
            self._in_flight.discard(delivery)
        self._wake.set()

    def _choose(
        self,
        found: Sequence[Delivery],
        room: int,
        hosts: "Counter[str]",
        keys: "Counter[str]",
    ) -> list[Delivery]:
        chosen: list[Delivery] = []
        for one in found:
            host, key = one.callback.origin, one.key_id
            if hosts[host] < self._limits.per_host and keys[key] < self._limits.per_key:
                hosts[host] += 1
                keys[key] += 1
                chosen.append(one)
        return chosen[:room]

    def _running(self) -> list[Delivery]:
        with self._lock:
            return list(self._in_flight)

    def _try(self, delivery: Delivery) -> None:
        try:
            self._report(delivery, *self._outcome(delivery))
        except SQLAlchemyError as error:
            # Not written down, so it is done again when the claim runs out.
            _log.warning(
                "a webhook's try could not be recorded",
                task_id=delivery.task_id,
                error=type(error).__name__,
            )
        finally:
            self._done(delivery)

    def _outcome(self, delivery: Delivery) -> tuple[str, str]:
        """Make a try and write down how it went; the result's name and the reason."""
        try:
            self._deliver(delivery)
        except TaskGone:
            self._outbox.drop(delivery)
            return "dropped", "the task was deleted"
        except FetchError as error:
            return self._fail(delivery, error.public_message), error.reason
        except SQLAlchemyError:
            raise
        except Exception as error:
            _log.error("a webhook's try broke", task_id=delivery.task_id, exc_info=error)
            return self._fail(delivery, "Internal error."), "internal"
        return "delivered" if self._outbox.delivered(delivery) else "", ""

    def _fail(self, delivery: Delivery, error: str) -> str:
        pause_s = self._pause_s(delivery.tries)
        if pause_s is None:
            return "given_up" if self._outbox.give_up(delivery, error) else ""
        return "failed" if self._outbox.retry(delivery, pause_s, error) else ""

    def _report(self, delivery: Delivery, result: str, reason: str) -> None:
        if not result:  # another node's result was there first
            return
        metrics.WEBHOOK_DELIVERIES.labels(result).inc()
        report = {"delivered": _log.info, "dropped": _log.info, "given_up": _log.error}
        report.get(result, _log.warning)(
            f"webhook {result.replace('_', ' ')}",
            task_id=delivery.task_id,
            receiver=delivery.callback.origin,  # path and query may hold a secret
            tries=delivery.tries,
            reason=reason,
        )


def _full(counts: "Counter[str]", limit: int) -> list[str]:
    return [name for name, count in counts.items() if count >= limit]
