"""What can be done to a scenario, and when: at random moments, most of them while work is done."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One kind of harm.

    ``strike`` does it and brings back what it took away, at once or after a while; False if there
    was nothing to be hit. Those that ``last`` are struck from a thread of their own, so that others
    fall into the same time.
    """

    name: str
    strike: Callable[[], bool | None]
    kills: bool = False
    lasts: bool = False
    weight: float = 1.0


class Trouble:
    """Strikes with ``faults``; the moments and the kinds follow from ``seed``."""

    def __init__(
        self, faults: list[Fault], seed: int, *, work_begun_since: Callable[[float], bool]
    ) -> None:
        self.faults = faults
        self.random = random.Random(seed)
        self.done = Counter[str]()
        self._work_begun_since = work_begun_since
        self._lasting: dict[str, threading.Thread] = {}
        self.failures: list[BaseException] = []

    @property
    def kills(self) -> int:
        """How many processes were killed so far."""
        names = {fault.name for fault in self.faults if fault.kills}
        return sum(count for name, count in self.done.items() if name in names)

    def strike_once(self, *, quiet_s: float) -> None:
        """Wait at random up to ``quiet_s``, mostly for new work after that, and strike."""
        began = time.time()
        time.sleep(self.random.uniform(0.0, quiet_s))
        if self.random.random() < 0.6:
            ends_at = time.monotonic() + 3.0
            while not self._work_begun_since(began) and time.monotonic() < ends_at:
                time.sleep(0.05)
        free = [fault for fault in self.faults if not self._is_at_work(fault.name)]
        if not free:  # each of them still lasts
            return
        self.strike(self.random.choices(free, [fault.weight for fault in free])[0])

    def strike(self, fault: Fault) -> None:
        """Do this one now."""
        self.done[fault.name] += 1
        if not fault.lasts:
            self._hit(fault)
            return
        thread = threading.Thread(target=self._last, args=(fault,), daemon=True)
        self._lasting[fault.name] = thread
        thread.start()

    def end(self) -> None:
        """Wait until all that lasts is over."""
        for thread in self._lasting.values():
            thread.join()

    def _hit(self, fault: Fault) -> None:
        if fault.strike() is False:
            self.done[fault.name] -= 1

    def _last(self, fault: Fault) -> None:
        try:
            self._hit(fault)
        except BaseException as error:
            self.failures.append(error)

    def _is_at_work(self, name: str) -> bool:
        thread = self._lasting.get(name)
        return thread is not None and thread.is_alive()
