"""The rules of the task store in plain Python: no SQL, no threads, no transactions."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from redux_server.tasks.rows import new_bytes
from redux_server.tasks.task import NewTask, Outcome, Status

CANCELLED = Outcome(
    status=Status.CANCELLED, code=1403, error="The task was cancelled at its owner's request."
)
Answer = tuple[str, str]


@dataclass
class Row:
    """What the model knows of a task; ``place`` is its place in the queue, for good."""

    id: str
    place: int
    key: str
    shape: str
    priority: int
    has_webhook: bool
    status: Status = Status.CREATED
    attempt: int = 0
    crashes: int = 0
    owner: str | None = None
    lease_until: float | None = None
    not_before: float | None = None
    started_at: float = 0.0
    is_queued: bool = True
    charged: float = 0.0
    is_unwanted: bool = False
    stored: int = 0
    reserved: int = 0  # of that, for its images
    outcome: Outcome | None = None


class Model:
    """Tasks of keys with the given ``priorities``, at most ``max_open`` of them open."""

    def __init__(
        self,
        *,
        priorities: dict[str, int],
        lease_s: float,
        max_attempts: int,
        max_open: int,
        max_stored: int,
    ) -> None:
        self.now = 1000.0
        self.priorities = priorities
        self.lease_s = lease_s
        self.max_attempts = max_attempts
        self.max_open = max_open
        self.max_stored = max_stored  # bytes of each key
        self.rows: dict[str, Row] = {}
        self.deleted: set[str] = set()
        self.told: set[str] = set()  # tasks with a message in the outbox
        self.used: dict[tuple[str, str], tuple[str, str, float]] = {}  # digest, task, time
        self.accepted = 0
        self.seconds: dict[str, float] = {}  # that each key has had
        self.typical: dict[str, float] = {}  # of a task of each

    def open(self) -> list[Row]:
        return [row for row in self.rows.values() if not row.status.is_terminal]

    def leased(self) -> list[Row]:
        return [row for row in self.rows.values() if row.lease_until is not None]

    def stored(self) -> Counter[str]:
        """What each key's tasks store."""
        found: Counter[str] = Counter()
        for row in self.rows.values():
            found[row.key] += row.stored
        return found

    # --- the owner's side ---------------------------------------------------------------------

    def accept(self, new: Sequence[NewTask]) -> list[Answer]:
        return [self._accept_one(task) for task in new]

    def _accept_one(self, new: NewTask) -> Answer:
        before = self.used.get((new.key_id, new.idempotency_key))
        if before is not None:
            digest, task_id, _ = before
            if digest != new.digest:
                return "conflict", "other"
            return ("replayed", task_id) if task_id in self.rows else ("conflict", "gone")
        if len(self.open()) >= self.max_open:
            return "full", ""
        left = self.max_stored - self.stored()[new.key_id]
        if new_bytes(new) > left:
            return "store full", str(max(0, left))
        self.accepted += 1
        if not any(row.key == new.key_id for row in self.open()):
            self._enter(new.key_id)
        self.rows[new.id] = Row(
            new.id,
            place=self.accepted,
            key=new.key_id,
            shape=new.shape,
            priority=self.priorities[new.key_id],
            has_webhook=new.webhook_url is not None,
            stored=new_bytes(new),
            reserved=new.output_bytes,
        )
        if new.idempotency_key:
            self.used[new.key_id, new.idempotency_key] = (new.digest, new.id, self.now)
        return "created", new.id

    def _enter(self, key: str) -> None:
        """Who comes back has had as much as the least of the others that are there."""
        priority = self.priorities[key]
        active = {row.key for row in self.open() if self.priorities[row.key] == priority}
        all_ = self.seconds.values()
        tag = min((self.seconds[each] for each in active), default=max(all_, default=0.0))
        self.seconds[key] = max(tag, self.seconds.get(key, 0.0))

    def cancel(self, task_id: str, key: str) -> Row | None:
        row = self.rows.get(task_id)
        if row is None or row.key != key:
            return None
        if row.lease_until is not None:
            row.is_unwanted = True
        elif not row.status.is_terminal:
            self.end(row, CANCELLED)
        return row

    def delete(self, ids: Sequence[str], key: str | None) -> set[str]:
        gone = {i for i in ids if i in self.rows and key in (None, self.rows[i].key)}
        for task_id in gone:
            del self.rows[task_id]
        self.deleted |= gone
        self.told -= gone
        return gone

    # --- the worker's side --------------------------------------------------------------------

    def claim(self, owner: str, n: int, like: str) -> list[Row]:
        self.take_back([row for row in self.leased() if (row.lease_until or 0.0) < self.now])
        for row in self.rows.values():
            if row.not_before is not None and row.not_before <= self.now:
                row.not_before, row.is_queued = None, True
        claimed: list[Row] = []
        while len(claimed) < n:
            first = claimed[0] if claimed else None
            if first is not None and not first.shape:
                break
            row = self._fairest(
                row
                for row in self.rows.values()
                if row.is_queued
                and (first is None or (row.shape, row.priority) == (first.shape, first.priority))
                and (not like or row.shape == like)
            )
            if row is None:
                break
            self._lease(row, owner)
            claimed.append(row)
        return claimed

    def _fairest(self, among: Iterable[Row]) -> Row | None:
        ready = list(among)
        top = [row for row in ready if row.priority == max(each.priority for each in ready)]
        oldest = [min((r for r in top if r.key == key), key=lambda r: r.place)
                  for key in {row.key for row in top}]  # fmt: skip
        return min(oldest, key=self._turn, default=None)

    def _turn(self, row: Row) -> tuple[float, float, int]:
        latest = max(other.started_at for other in self.rows.values() if other.key == row.key)
        return self.seconds[row.key], latest, row.place

    def _lease(self, row: Row, owner: str) -> None:
        row.status, row.owner, row.is_queued = Status.PROCESSING, owner, False
        row.attempt += 1
        row.started_at = self.now
        row.lease_until = self.now + self.lease_s
        row.charged = self.typical.get(row.key, 1.0)
        self.seconds[row.key] += row.charged

    def renew(self, owner: str, held: dict[str, int]) -> tuple[set[str], set[str]]:
        lost, cancelled = set(), set()
        for task_id, attempt in held.items():
            row = self.rows.get(task_id)
            is_held = row is not None and row.lease_until is not None
            if not is_held or (row.owner, row.attempt) != (owner, attempt):
                lost.add(task_id)
                continue
            row.lease_until = self.now + self.lease_s
            if row.is_unwanted:
                cancelled.add(task_id)
        return lost, cancelled

    def finish(
        self,
        task_id: str,
        attempt: int,
        outcome: Outcome,
        cost_s: float | None = None,
        kept_bytes: int | None = None,
    ) -> bool:
        row = self.rows.get(task_id)
        if row is None or row.status is not Status.PROCESSING or row.attempt != attempt:
            return False
        if cost_s is not None:
            self.seconds[row.key] += cost_s - row.charged
            typical = self.typical.get(row.key, 1.0)
            self.typical[row.key] = typical * 0.7 + max(0.01, cost_s) * 0.3
        self.end(row, outcome, kept_bytes)
        return True

    def give_back(
        self, task_id: str, attempt: int, *, delay_s: float, error: str, has_crashed: bool
    ) -> bool:
        row = self.rows.get(task_id)
        if row is None or row.lease_until is None or row.attempt != attempt:
            return False
        self.take_back([row], has_crashed=has_crashed, delay_s=delay_s, error=error)
        return True

    def take_back(
        self, rows: list[Row], *, has_crashed: bool = True, delay_s: float = 0.0, error: str = ""
    ) -> int:
        for row in rows:
            if row.is_unwanted:
                self.end(row, CANCELLED)
            elif has_crashed and row.crashes + 1 >= self.max_attempts:
                times = f"{self.max_attempts} times"
                text = error or f"The worker stopped unexpectedly {times} during this task."
                self.end(row, Outcome.failure(5000, text))
            else:
                row.lease_until = row.owner = None
                row.crashes += has_crashed
                row.shape = "" if has_crashed else row.shape
                row.not_before = self.now + delay_s if delay_s else None
                row.is_queued = not delay_s
        return len(rows)

    def end(self, row: Row, outcome: Outcome, kept_bytes: int | None = None) -> None:
        kept = row.attempt * row.reserved if kept_bytes is None else kept_bytes
        row.stored += kept - row.reserved
        row.status, row.outcome = outcome.status, outcome
        row.is_queued, row.lease_until, row.not_before = False, None, None
        if row.has_webhook and outcome.status is not Status.CANCELLED:
            self.told.add(row.id)

    # --- looking after all --------------------------------------------------------------------

    def forget(self, when: float) -> int:
        old = [name for name, (_, _, at) in self.used.items() if at < when]
        for name in old:
            del self.used[name]
        return len(old)
