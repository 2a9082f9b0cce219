"""One storm: clients at work, trouble among them, then calm, and what is to be said of it all."""

import dataclasses
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Row

from chaos.clients import Client, Habits, Receiver, webhook_receiver
from chaos.faults import Fault, Trouble
from e2e.history import Anomaly, TaskHistory, check
from e2e.live import ROOT, wait_until
from redux_server.tasks.task import Status

STUCK_S = 60.0
PATIENCE_S = 150.0  # without any progress: a busy machine is slow, but does not stand still


class Scenario(Protocol):
    """A server, or several, that can be harmed."""

    name: str

    @property
    def urls(self) -> list[str]: ...
    @property
    def key(self) -> str: ...
    @property
    def log(self) -> str: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def rows(self) -> dict[str, Row[Any]]: ...
    def pids(self) -> list[int]: ...
    def faults(self) -> list[Fault]: ...
    def supervise(self) -> int: ...
    def save_logs(self, folder: Path) -> None: ...


_COUNTED = ("lost", "never_ended", "stuck", "unexpected", "failures")


@dataclass(frozen=True)
class Goal:
    """When a storm may end: when all of this is reached, or after ``at_most_s``."""

    tasks: int = 0
    strikes: int = 0
    seconds: float = 0.0
    at_most_s: float = math.inf


@dataclass
class Finding:
    """What one storm came to; ``report`` is its JSON."""

    engine: str
    seed: int
    took_s: float
    strikes: dict[str, int]
    kills: int
    accepted: int
    lost: list[str]
    never_ended: list[str]
    anomalies: list[Anomaly]
    unexpected: list[str]
    stuck: list[str]
    longer_than_60_s: int
    ends: dict[str, int]
    latency_s: dict[str, float]
    attempts_repeated: int
    unanswered_but_there: int
    answers: dict[str, int]
    webhooks: dict[str, int]
    twin_submits: int
    restarted_by_itself: int
    failures: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        broken = (self.lost, self.never_ended, self.stuck, self.anomalies, self.unexpected)
        return not any(broken) and not self.failures

    def report(self) -> dict[str, Any]:
        """The figures; of what is broken, how much and the first of it."""
        told = dataclasses.asdict(self)
        for name in _COUNTED:
            told[name] = len(told[name])
        kinds = Counter(anomaly.kind for anomaly in self.anomalies)
        told["anomalies"] = dict(kinds)
        examples = [dataclasses.asdict(anomaly) for anomaly in self.anomalies[:10]]
        if not self.is_good:
            told["examples"] = {
                "anomalies": examples,
                **{name: getattr(self, name)[:10] for name in _COUNTED},
            }
        return {"good": self.is_good, **told}


class Storm:
    """Runs over a started scenario, once."""

    def __init__(
        self,
        scenario: Scenario,
        faults: Sequence[Fault],
        seed: int,
        *,
        clients: int = 6,
        habits: Habits | None = None,
        patience_s: float = PATIENCE_S,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._patience_s = patience_s
        self.scenario = scenario
        self.seed = seed
        self.say = say
        self._habits = habits or Habits()
        self._count = clients
        self._before = set(scenario.rows())
        self._rows: dict[str, Row[Any]] = {}
        self._restarted = 0
        self.clients: list[Client] = []
        self.trouble = Trouble(list(faults), seed, work_begun_since=self._work_begun_since)

    def run(self, goal: Goal) -> Finding:
        """Until ``goal`` is reached and all is calm again."""
        began = time.monotonic()
        refused = self._habits.refused_webhooks
        with webhook_receiver(self.seed, refused=refused) as (receiver, hook):
            self.clients = [
                Client(self.scenario.urls, self.scenario.key, self.seed * 100 + number,
                       hook=hook, habits=self._habits)
                for number in range(self._count)
            ]  # fmt: skip
            for client in self.clients:
                client.start()
            try:
                self._rage(goal, began)
                self.trouble.end()
                self._calm_down(receiver)
            finally:
                for client in self.clients:
                    client.may_submit.clear()
                    client.may_end.set()
            for client in self.clients:
                client.join(60)
                client.look_once_more()
                client.http.close()
            return self._finding(receiver, time.monotonic() - began)

    # --- while it lasts ------------------------------------------------------------------------

    def _rage(self, goal: Goal, began: float) -> None:
        """Strike as often as the tasks accepted meanwhile allow, so that both goals are met."""
        progress, told_at = _Progress(self._patience_s), began
        while not self._is_reached(goal, began):
            self._restarted += self.scenario.supervise()
            struck, accepted = self.trouble.done.total(), self.accepted
            progress.note((struck, accepted))
            assert not progress.has_stopped, f"nothing moves any more:\n{self.scenario.log}"
            if struck and time.monotonic() - told_at > 20:
                told_at = time.monotonic()
                self.say(f"{struck} strikes, {accepted} tasks, {told_at - began:.0f} s")
            if not self._may_strike(goal, began):
                time.sleep(0.2)
            elif self.trouble.faults:
                self.trouble.strike_once(quiet_s=2.0)

    def _is_reached(self, goal: Goal, began: float) -> bool:
        took_s = time.monotonic() - began
        return took_s > goal.at_most_s or (
            took_s >= goal.seconds
            and self.trouble.done.total() >= goal.strikes
            and self.accepted >= goal.tasks
        )

    def _may_strike(self, goal: Goal, began: float) -> bool:
        struck = self.trouble.done.total()
        if goal.strikes and struck >= goal.strikes and not goal.seconds:
            return False
        return struck <= goal.strikes * self.accepted / max(1, goal.tasks) or not goal.tasks

    @property
    def accepted(self) -> int:
        return sum(len(client.histories) for client in self.clients)

    def _work_begun_since(self, when: float) -> bool:
        try:
            rows = self.scenario.rows()
        except Exception:  # the database is away: that is work enough
            return True
        return any(row.lease_until and (row.started_at or 0) > when for row in rows.values())

    # --- afterwards ----------------------------------------------------------------------------

    def _calm_down(self, receiver: Receiver) -> None:
        for client in self.clients:
            client.may_submit.clear()
        progress = _Progress(self._patience_s)

        def is_calm() -> bool:
            self._restarted += self.scenario.supervise()
            still = sum(
                not log.ends and log.deleted_at is None
                for client in self.clients
                for log in list(client.histories)
            )
            untold = len(self._to_be_told() - receiver.told_ids())
            progress.note((still, untold))
            return not (still or untold) or progress.has_stopped

        wait_until(is_calm, 3600, every_s=0.2)
        wait_until(lambda: not self._open_rows(), STUCK_S, every_s=0.5, must=False)

    def _to_be_told(self) -> set[str]:
        return {
            log.id
            for client in self.clients
            for log in list(client.histories)
            if log.has_webhook
            and log.deleted_at is None
            and (not log.ends or (log.ends[0].prediction or {}).get("status") != "cancelled")
        }

    def _open_rows(self) -> list[str]:
        self._rows = {
            id_: row for id_, row in self.scenario.rows().items() if id_ not in self._before
        }
        return [id_ for id_, row in self._rows.items() if not Status(row.status).is_terminal]

    def _finding(self, receiver: Receiver, took_s: float) -> Finding:
        histories = [log for client in self.clients for log in client.histories]
        twins = [log for client in self.clients for log in client.twins]
        strays = receiver.hand_out(histories)
        accepted = {log.id for log in histories}
        deleted = {log.id for log in histories if log.deleted_at is not None}
        never_ended = self._open_rows()
        rows = self._rows.values()
        return Finding(
            engine=self.scenario.name,
            seed=self.seed,
            took_s=round(took_s, 1),
            strikes=dict(sorted(self.trouble.done.items())),
            kills=self.trouble.kills,
            accepted=len(accepted),
            lost=sorted(accepted - self._rows.keys() - deleted),
            never_ended=never_ended,
            anomalies=check([*histories, *twins], bound_s=math.inf),
            stuck=[log.id for log, late_s in overtaken(histories) if late_s > STUCK_S],
            longer_than_60_s=sum(log.took_s > STUCK_S for log in histories if log.ends),
            unexpected=[text for client in self.clients for text in client.unexpected],
            ends=dict(Counter(row.status for row in rows)),
            latency_s=_latencies(histories),
            attempts_repeated=sum(max(0, row.attempt - 1) for row in rows),
            unanswered_but_there=len(self._rows.keys() - accepted),
            answers=dict(sorted(sum((c.seen for c in self.clients), Counter[str]()).items())),
            webhooks={"calls": len(receiver.calls), "of tasks whose submit had no answer": strays},
            twin_submits=len(twins),
            restarted_by_itself=self._restarted,
            failures=[repr(c.failure) for c in self.clients if c.failure]
            + [repr(error) for error in self.trouble.failures],
        )


class _Progress:
    """Whether anything changed of late: no deadline that a slow machine would miss."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._state: Any = None
        self._changed_at = time.monotonic()

    def note(self, state: Any) -> None:
        if state != self._state:
            self._state, self._changed_at = state, time.monotonic()

    @property
    def has_stopped(self) -> bool:
        return time.monotonic() - self._changed_at > self._patience_s


def overtaken(histories: Sequence[TaskHistory]) -> Iterator[tuple[TaskHistory, float]]:
    """For each task that ended, how long it was seen open after a younger one had, in seconds.

    That is what it means to be stuck, on any machine: tasks of one key are worked on in their
    order, so what waits while younger ones are done was forgotten, however slow all the rest is.
    Those that were cancelled never were in anyone's way. Polls without an answer say nothing: while
    the database is away a task that has ended cannot be seen to.
    """
    first_younger_end = math.inf
    for log in sorted(histories, key=lambda log: log.accepted_at, reverse=True):
        if log.ends:
            open_until = max((poll.at for poll in log.polls if poll.is_open), default=0.0)
            yield log, max(0.0, open_until - max(first_younger_end, log.accepted_at))
            if log.cancelled_at is None:
                first_younger_end = min(first_younger_end, log.ends[0].at)


def _latencies(histories: Sequence[TaskHistory]) -> dict[str, float]:
    took = sorted(log.took_s for log in histories if log.ends)
    if not took:
        return {}
    return {
        "median": round(statistics.median(took), 2),
        "p99": round(took[int(0.99 * (len(took) - 1))], 2),
        "longest": round(took[-1], 2),
        "longest after a younger one": round(max(late_s for _, late_s in overtaken(histories)), 2),
    }


def environment(plant: str) -> Mapping[str, str]:
    """The variables of every process of a scenario, with the bug ``plant`` or none."""
    ours = [ROOT / name for name in ("server", "pipelines", "kernels", "weights")]
    found = {"PYTHONPATH": os.pathsep.join(map(str, [ROOT / "tests" / "chaos" / "site", *ours]))}
    return {**found, "CHAOS_BUG": plant} if plant else found
