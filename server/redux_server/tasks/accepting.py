"""Accepting tasks: the bounds of the queue and of each key, and idempotency keys.

An idempotency key belongs to the API key that sent it. The first request with it makes a task;
later ones are answered with that task, or refused if they ask for something else.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, delete, exists, func, insert, select, tuple_

from redux_server.database.connection import reader
from redux_server.database.tables import idempotency, tasks
from redux_server.tasks import stored, usage
from redux_server.tasks.rows import (
    COLUMNS,
    IS_DELAYED,
    IS_LEASED,
    IS_QUEUED,
    count,
    new_bytes,
    new_row,
    task_from,
    task_of,
)
from redux_server.tasks.task import (
    Acceptance,
    Created,
    FreePlaces,
    KeyConflict,
    KeyFull,
    NewTask,
    NoRoom,
    Replayed,
    ShareFull,
    Status,
    StoreFull,
    Task,
)

REJOINED_S = 60.0
_TICK_S = 1e-6
_LEFT = "\x1f"  # before the digest, of what no client can send as its key
_Known = dict[tuple[str, str], tuple[str, Task | None]]


def unbounded(_stored_bytes: int) -> int:
    """How many bytes more a key may store where no bound is set."""
    return sys.maxsize


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many tasks may be open: ``of_all``, and ``of_a_key`` (0: as many as of all).

    A key that is alone may fill ``share`` percent of the queue. The rule is that it may have at
    most ``share / (100 - share)`` times as many open tasks as places are free. So two keys, or
    more, get equal parts, and there is always room left for the first tasks of another. Source:
    Choudhury and Hahne, "Dynamic queue length thresholds", IEEE/ACM ToN 6 (1998). 100 is no rule.

    Of a key whose tasks count so many bytes, ``left_bytes`` says how many more they may.
    """

    of_all: int
    of_a_key: int = 0
    share: int = 100
    left_bytes: Callable[[int], int] = unbounded

    def left_of_share(self, opened: int, free: int) -> int:
        """How many tasks more a key with ``opened`` open ones may have while ``free`` are free."""
        if self.share == 100:
            return sys.maxsize
        return -((opened * (100 - self.share) - self.share * free) // 100)


def accept(
    db: Connection, new: Sequence[NewTask], *, bounds: Bounds, now: float
) -> list[Acceptance]:
    """What becomes of each of ``new``, in the order given; what is created is inserted.

    Belongs into a transaction of its own that takes turns with others.
    """
    room = _left_of_all(db, bounds)
    key_ids = {task.key_id for task in new}
    by_key = OpenByKey(db, key_ids, limit=bounds.of_a_key)
    priorities = usage.priorities_of(db, key_ids)
    idle = {key_id: priorities[key_id] for key_id in key_ids if not by_key.count(key_id)}
    by_bytes = StoredByKey(db, key_ids, bounds.left_bytes)
    known = _recall(db, new)
    answers: list[Acceptance] = []
    rows: list[dict[str, Any]] = []
    for task in new:
        answer = _answer_again(task, known)
        if answer is None and not by_key.has_room(task.key_id):
            answer = KeyFull()
        if answer is None and len(rows) >= room:
            answer = NoRoom()
        if answer is None and (
            bounds.left_of_share(by_key.count(task.key_id), room - len(rows)) <= 0
        ):
            answer = ShareFull()
        if answer is None:
            answer = by_bytes.refusal(task)
        if answer is None:
            # A tick apart, so that the order within a batch is an order everywhere.
            at = now + len(rows) * _TICK_S
            rows.append(new_row(task, priority=priorities[task.key_id], now=at))
            by_key.add(task.key_id)
            by_bytes.add(task.key_id, rows[-1]["stored_bytes"])
            answer = Created(task_from(rows[-1]))
            if task.idempotency_key:
                known[task.key_id, task.idempotency_key] = task.digest, answer.task
        answers.append(answer)
    if rows:
        created = {row["key_id"] for row in rows}
        usage.enter(db, {key_id: idle[key_id] for key_id in created & idle.keys()})
        db.execute(insert(tasks), rows)
        stored.add_up(db, created)
        stored.note(db, by_bytes.added)
        _remember(db, new, answers, now)
    return answers


def free_places(database: Engine, key_ids: Sequence[str], *, bounds: Bounds) -> list[FreePlaces]:
    """How many tasks more ``accept`` would take of these API keys now, in the order given."""
    with reader(database).connect() as db:
        room = _left_of_all(db, bounds)
        by_key = OpenByKey(db, set(key_ids), limit=bounds.of_a_key)
        by_bytes = StoredByKey(db, set(key_ids), bounds.left_bytes)
        return [
            FreePlaces(
                room,
                by_key.left(key_id),
                bounds.left_of_share(by_key.count(key_id), room),
                by_bytes.left(key_id),
            )
            for key_id in key_ids
        ]


class OpenByKey:
    """The open tasks of some keys within one transaction.

    Counted by the database, so that a ``limit`` holds for all nodes; exact where transactions that
    accept take turns. A ``limit`` of 0 is none.
    """

    def __init__(self, db: Connection, key_ids: Set[str], *, limit: int) -> None:
        self._limit = limit
        query = (
            select(tasks.c.key_id, func.count())
            .where(tasks.c.finished_at.is_(None), tasks.c.key_id.in_(key_ids))
            .group_by(tasks.c.key_id)
        )
        self._open = Counter({key_id: count for key_id, count in db.execute(query)})

    def has_room(self, key_id: str) -> bool:
        """Whether ``key_id`` may have another open task."""
        return self.left(key_id) > 0

    def count(self, key_id: str) -> int:
        """How many open tasks ``key_id`` has."""
        return self._open[key_id]

    def left(self, key_id: str) -> int:
        """How many open tasks more ``key_id`` may have."""
        return self._limit - self._open[key_id] if self._limit else sys.maxsize

    def add(self, key_id: str) -> None:
        """Count a task that was accepted in this transaction."""
        self._open[key_id] += 1


class StoredByKey:
    """What the tasks of some keys store within one transaction; exact as ``OpenByKey`` is."""

    def __init__(self, db: Connection, key_ids: Set[str], left_bytes: Callable[[int], int]) -> None:
        before = stored.by_key(db, key_ids)
        self._left = {key_id: left_bytes(before[key_id]) for key_id in key_ids}
        self.added: Counter[str] = Counter()

    def left(self, key_id: str) -> int:
        """How many bytes more the tasks of ``key_id`` may count."""
        return self._left[key_id] - self.added[key_id]

    def refusal(self, new: NewTask) -> StoreFull | None:
        """Why ``new`` is not accepted; None if there is room for it."""
        needed, left = new_bytes(new), self.left(new.key_id)
        return StoreFull(needed, max(0, left)) if needed > left else None

    def add(self, key_id: str, size_bytes: int) -> None:
        """Count a task that was accepted in this transaction."""
        self.added[key_id] += size_bytes


class IdempotencyKeys:
    """The idempotency keys that came. Every method may be called from any thread."""

    def __init__(self, database: Engine, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._reader = reader(database)
        self._clock = clock

    def knows(self, key_id: str, idempotency_key: str) -> bool:
        """Whether an API key has sent this idempotency key before."""
        mine = idempotency.c.key_id == key_id, idempotency.c.key == idempotency_key
        with self._reader.connect() as db:
            return bool(db.scalar(select(exists().where(*mine))))

    def recall(self, new: NewTask) -> Acceptance | None:
        """The answer that ``accept`` has for ``new`` already; None if its key is new to us."""
        with self._reader.connect() as db:
            return _answer_again(new, _recall(db, [new]))

    def leave(self, key_id: str, digest: str, task_id: str) -> None:
        """Note that whoever waited for a task has gone; ``digest`` is that of the request."""
        row = {"key_id": key_id, "key": _LEFT + digest, "digest": digest, "task_id": task_id}
        mine = idempotency.c.key_id == key_id, idempotency.c.key == row["key"]
        with self._database.begin() as db:
            db.execute(delete(idempotency).where(*mine))
            db.execute(insert(idempotency), row | {"created_at": self._clock()})

    def rejoin(self, key_id: str, digest: str) -> Task | None:
        """The task of such a request whose caller left within ``REJOINED_S``, once.

        None for a task that was cancelled or deleted: whoever asks again wants another.
        """
        mine = idempotency.c.key_id == key_id, idempotency.c.key == _LEFT + digest
        recent = idempotency.c.created_at > self._clock() - REJOINED_S
        with self._reader.connect() as db:
            if not db.scalar(select(exists().where(*mine, recent))):
                return None
        with self._database.begin() as db:
            left = delete(idempotency).where(*mine, recent).returning(idempotency.c.task_id)
            task_id = db.scalar(left)
            wanted = tasks.c.id == task_id, tasks.c.cancel_requested_at.is_(None)
            row = db.execute(select(*COLUMNS).where(*wanted)).one_or_none()
        task = None if row is None else task_of(row)
        return None if task is None or task.status is Status.CANCELLED else task

    def forget(self, before: float) -> int:
        """Free those that came ``before`` (Unix seconds); returns how many."""
        old = idempotency.c.created_at < before
        with self._database.begin() as db:
            return int(db.execute(delete(idempotency).where(old)).rowcount)


def _left_of_all(db: Connection, bounds: Bounds) -> int:
    is_open = count(IS_QUEUED) + count(IS_LEASED) + count(IS_DELAYED)
    return bounds.of_all - int(db.scalar(select(is_open)) or 0)


def _recall(db: Connection, new: Sequence[NewTask]) -> _Known:
    wanted = {(task.key_id, task.idempotency_key) for task in new if task.idempotency_key}
    if not wanted:
        return {}
    pair = tuple_(idempotency.c.key_id, idempotency.c.key)
    entries = db.execute(select(idempotency).where(pair.in_(wanted))).all()
    ids = [entry.task_id for entry in entries]
    rows = db.execute(select(*COLUMNS).where(tasks.c.id.in_(ids))) if ids else ()
    first = {row.id: task_of(row) for row in rows}
    return {
        (entry.key_id, entry.key): (entry.digest, first.get(entry.task_id)) for entry in entries
    }


def _answer_again(new: NewTask, known: _Known) -> Acceptance | None:
    found = known.get((new.key_id, new.idempotency_key)) if new.idempotency_key else None
    if found is None:
        return None
    digest, task = found
    if digest != new.digest or task is None:
        return KeyConflict(is_gone=digest == new.digest)
    return Replayed(task)


def _remember(
    db: Connection, new: Sequence[NewTask], answers: Sequence[Acceptance], now: float
) -> None:
    entries = [
        {
            "key_id": task.key_id,
            "key": task.idempotency_key,
            "digest": task.digest,
            "task_id": task.id,
            "created_at": now,
        }
        for task, answer in zip(new, answers, strict=True)
        if task.idempotency_key and isinstance(answer, Created)
    ]
    if entries:
        db.execute(insert(idempotency), entries)
