"""What is refused whatever is brought: too much at once, or anything while the disk is full."""

import math

from redux_server import metrics
from redux_server.disk import DiskSpace
from redux_server.errors import TooManyRequests, Unavailable
from redux_server.rate_limit import RateLimit


def refuse_excess(rate: RateLimit, key_id: str, *, may: str) -> None:
    """Count one of ``key_id``; ``may`` says what it may do, as in "submit 5 tasks".

    Raises:
        TooManyRequests: it comes faster than ``rate`` allows.
    """
    wait_s = rate.take(key_id)
    if wait_s:
        metrics.REJECTED.labels("rate_limit").inc()
        raise TooManyRequests(
            f"This API key may {may} a minute; the next one in {math.ceil(wait_s)} s.",
            headers={"Retry-After": str(math.ceil(wait_s))},
        )


def refuse_without_room(disk: DiskSpace, *, refused: str, therefore: str) -> None:
    """Begins with ``refused`` ("No task is accepted now"), ends in ``therefore``.

    Raises:
        Unavailable: the disk is nearly full.
    """
    reason = disk.complaint()
    if reason is not None:
        metrics.REJECTED.labels("disk_full").inc()
        raise Unavailable(f"{refused}: {reason}; {therefore}.", headers={"Retry-After": "30"})
