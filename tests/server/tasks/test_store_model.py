"""TaskStore against a model of it in plain Python, over histories that hypothesis invents."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine, delete, event, insert, select

from redux_server.database.migration import open_database
from redux_server.database.tables import idempotency, keys, stored, tasks, usage, webhooks
from redux_server.tasks import claiming
from redux_server.tasks import stored as ledger
from redux_server.tasks.accepting import IdempotencyKeys
from redux_server.tasks.store import Cancellation, Lease, TaskStore
from redux_server.tasks.task import (
    Acceptance,
    Created,
    KeyConflict,
    NewTask,
    NoRoom,
    Outcome,
    Replayed,
    Status,
    StoreFull,
    Task,
)
from server.store_model import Answer, Model, Row

LEASE_S = 10.0
MAX_ATTEMPTS = 3
MAX_OPEN = 6
MAX_STORED = 60_000  # of a key: some ten tasks
PRIORITIES = {"ada": 0, "ben": 0, "vip": 3}
KEYS = st.sampled_from(list(PRIORITIES))
OWNERS = st.sampled_from(["anna", "bela"])
SHAPES = st.sampled_from(["", "s", "t"])
OUTCOMES = st.sampled_from(
    [
        Outcome(status=Status.COMPLETED, outputs=["0.png"], seeds=[1]),
        Outcome.failure(1402, "no picture"),
        Outcome.cancellation(),
    ]
)
ORDER = [Status.CREATED, Status.PROCESSING, Status.COMPLETED]


class StoreMachine(RuleBasedStateMachine):
    """Each rule does the same to both; the invariants compare what is left."""

    ids = Bundle("ids")
    claims = Bundle("claims")  # what workers remember, long after they may have lost it

    def __init__(self, engine: Engine, store_class: type[TaskStore]) -> None:
        super().__init__()
        with engine.begin() as db:
            for table in (tasks, idempotency, webhooks, keys, usage, stored):
                db.execute(delete(table))
            for key, priority in PRIORITIES.items():
                known = {"id": key, "name": key, "digest": key, "created_at": 0.0}
                db.execute(insert(keys), {**known, "priority": priority})
        self.engine = engine
        self.model = Model(
            priorities=PRIORITIES,
            lease_s=LEASE_S,
            max_attempts=MAX_ATTEMPTS,
            max_open=MAX_OPEN,
            max_stored=MAX_STORED,
        )
        self.store = store_class(
            engine, lease_s=LEASE_S, max_attempts=MAX_ATTEMPTS, clock=lambda: self.model.now
        )
        self.idempotency = IdempotencyKeys(engine)
        self.seen: dict[str, Task] = {}

    # --- the owner's side ---------------------------------------------------------------------

    @rule(
        target=ids,
        count=st.integers(1, 4),
        key=KEYS,
        shape=SHAPES,
        has_webhook=st.booleans(),
        sizes=st.sampled_from([(0, 0), (3000, 1000), (0, 9000), (MAX_STORED, 0)]),
    )
    def accept(
        self, count: int, key: str, shape: str, has_webhook: bool, sizes: tuple[int, int]
    ) -> Any:
        new = [
            NewTask(
                key,
                "m",
                {},
                shape=shape,
                webhook_url="https://example.com/hook" if has_webhook else None,
                picture_bytes=sizes[0],
                output_bytes=sizes[1],
            )
            for _ in range(count)
        ]
        return self._accept(new)

    @rule(
        target=ids,
        key=KEYS,
        names=st.lists(st.sampled_from(["", "i", "j"]), min_size=1, max_size=3),
        digest=st.sampled_from(["1", "1", "2"]),
    )
    def accept_with_idempotency_keys(self, key: str, names: list[str], digest: str) -> Any:
        new = [
            NewTask(key, "m", {}, idempotency_key=name, digest=digest if name else "")
            for name in names
        ]
        recalled = self.idempotency.recall(new[0])
        before = self.model.used.get((key, names[0]))
        assert (recalled is not None) == (before is not None)
        return self._accept(new)

    def _accept(self, new: list[NewTask]) -> Any:
        self.model.now += 0.001  # so that no two batches come at the same moment
        answers = self.store.accept(
            new, max_open=MAX_OPEN, left_bytes=lambda stored_bytes: MAX_STORED - stored_bytes
        )
        assert [_plain(answer) for answer in answers] == self.model.accept(new)
        return multiple(*(task.id for task in new))

    @rule(task_id=ids, key=KEYS)
    def cancel(self, task_id: str, key: str) -> None:
        before = {key: row.status for key, row in self.model.rows.items()}
        got, expected = self.store.cancel(task_id, key), self.model.cancel(task_id, key)
        assert (got and got.task.id) == (expected and expected.id)
        if got is not None and expected is not None:
            assert got.task.status == expected.status
            assert got.has_ended_it == (expected.status is not before[task_id])

    @rule(task_id=ids)
    def cancel_by_its_owner(self, task_id: str) -> None:
        row = self.model.rows.get(task_id)
        self.cancel(task_id, row.key if row else "ada")

    @rule(task_ids=st.lists(ids, max_size=3), key=st.one_of(st.none(), KEYS))
    def delete(self, task_ids: list[str], key: str | None) -> None:
        gone = self.store.delete(task_ids, key_id=key)
        assert sorted(gone) == sorted(self.model.delete(task_ids, key))

    # --- the worker's side --------------------------------------------------------------------

    @rule(target=claims, owner=OWNERS, n=st.sampled_from([1, 1, 2, 3]), like=SHAPES)
    def claim(self, owner: str, n: int, like: str) -> Any:
        got, expected = self.store.claim(owner, n, like=like), self.model.claim(owner, n, like)
        assert [(t.id, t.attempt) for t in got] == [(row.id, row.attempt) for row in expected]
        return multiple(*((task.id, task.attempt) for task in got))

    @rule(target=claims, owner=OWNERS)
    def worker_crashes_at_its_next_task(self, owner: str) -> Any:
        claimed = self.claim(owner, 1, "")
        self.worker_is_gone(owner, has_crashed=True)
        return claimed

    @rule(
        claim=claims,
        outcome=OUTCOMES,
        cost_s=st.sampled_from([None, 0.0, 0.5, 8.0]),
        kept_bytes=st.sampled_from([None, 0, 700, 20_000]),
    )
    def finish(
        self,
        claim: tuple[str, int],
        outcome: Outcome,
        cost_s: float | None = None,
        kept_bytes: int | None = None,
    ) -> None:
        ours = self.store.finish(*claim, outcome, cost_s=cost_s, kept_bytes=kept_bytes)
        assert ours == self.model.finish(*claim, outcome, cost_s, kept_bytes)

    @rule(target=claims, claim=claims, outcome=OUTCOMES)
    def frozen_worker_comes_back(self, claim: tuple[str, int], outcome: Outcome) -> Any:
        """It knows of nothing; its tasks have gone to another meanwhile."""
        self.model.now += LEASE_S + 1
        claimed = self.claim("bela", 3, "")
        self.finish(claim, outcome)
        return claimed

    @rule(owner=OWNERS, held=st.lists(claims, max_size=3))
    def renew(self, owner: str, held: list[tuple[str, int]]) -> None:
        attempts = dict(held)
        lease = self.store.renew(owner, {key: (attempt, 7) for key, attempt in attempts.items()})
        assert (lease.lost, lease.cancelled) == self.model.renew(owner, attempts)

    @rule(owner=OWNERS)
    def heartbeat(self, owner: str) -> None:
        """Of a worker that remembers well."""
        held = [(row.id, row.attempt) for row in self.model.leased() if row.owner == owner]
        self.renew(owner, held)

    @rule(claim=claims)
    def cancel_is_heard_of(self, claim: tuple[str, int]) -> None:
        self.cancel_by_its_owner(claim[0])
        for owner in ("anna", "bela"):
            self.heartbeat(owner)

    @rule(
        claim=claims,
        delay_s=st.sampled_from([0.0, 5.0]),
        error=st.sampled_from(["", "out of memory"]),
        has_crashed=st.booleans(),
    )
    def give_back(
        self, claim: tuple[str, int], delay_s: float, error: str, has_crashed: bool
    ) -> None:
        how: Any = {"delay_s": delay_s, "error": error, "has_crashed": has_crashed}
        assert self.store.give_back(*claim, **how) == self.model.give_back(*claim, **how)

    @rule(owner=OWNERS, delay_s=st.sampled_from([0.0, 5.0]))
    def holder_gives_back(self, owner: str, delay_s: float) -> None:
        held = [(row.id, row.attempt) for row in self.model.leased() if row.owner == owner]
        for claim in held[:1]:
            self.give_back(claim, delay_s, "", False)

    @rule(owner=OWNERS, has_crashed=st.booleans())
    def worker_is_gone(self, owner: str, has_crashed: bool) -> None:
        held = [row for row in self.model.leased() if row.owner == owner]
        released = self.store.release(owner, has_crashed=has_crashed)
        assert released == self.model.take_back(held, has_crashed=has_crashed)

    # --- everything else ----------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.5, 5.0, LEASE_S, LEASE_S + 1, 3 * LEASE_S]))
    def time_passes(self, seconds: float) -> None:
        self.model.now += seconds

    @rule(age_s=st.sampled_from([0.0, 20.0]))
    def idempotency_keys_grow_old(self, age_s: float) -> None:
        when = self.model.now - age_s
        assert self.idempotency.forget(when) == self.model.forget(when)

    @rule()
    def server_restarts(self) -> None:
        """Nothing that matters is in the store's memory."""
        self.engine.dispose()

    @invariant()
    def rows_are_as_the_model_says(self) -> None:
        with self.engine.connect() as db:
            found = {row.id: row for row in db.execute(select(tasks))}
            told = set(db.scalars(select(webhooks.c.task_id)))
        assert found.keys() == self.model.rows.keys()  # accepted is known, and nothing else
        assert told == self.model.told
        for row in self.model.rows.values():
            _compare(found[row.id], row)
        assert len(self.model.open()) <= MAX_OPEN
        in_ledger, in_rows = self.store.stored_bytes(), self.model.stored()
        assert {key: in_ledger[key] for key in PRIORITIES} == {
            key: in_rows[key] for key in PRIORITIES
        }
        state = self.store.queue_state()
        assert state.running == len(self.model.leased())
        assert state.waiting + state.running == len(self.model.open())

    @invariant()
    def clients_see_no_step_back(self) -> None:
        rows, deleted = list(self.model.rows), list(self.model.deleted)
        found = self.store.get([*rows, *deleted])
        assert set(found[len(rows) :]) <= {None}
        for task in found[: len(rows)]:
            assert task is not None
            assert task.outcome == self.model.rows[task.id].outcome
            before = self.seen.get(task.id, task)
            assert _rank(task) >= _rank(before)
            if before.status.is_terminal:
                assert task == before
            self.seen[task.id] = task


def _plain(answer: Acceptance) -> Answer:
    match answer:
        case Created(task):
            return "created", task.id
        case Replayed(task):
            return "replayed", task.id
        case KeyConflict(is_gone):
            return "conflict", "gone" if is_gone else "other"
        case NoRoom():
            return "full", ""
        case StoreFull(_, left_bytes):
            return "store full", str(left_bytes)


def _compare(stored: Any, row: Row) -> None:
    assert (stored.status, stored.attempt, stored.crashes) == (row.status, row.attempt, row.crashes)
    assert (stored.key_id, stored.priority, stored.shape) == (row.key, row.priority, row.shape)
    assert (stored.lease_until, stored.not_before) == (row.lease_until, row.not_before)
    assert (stored.queued_at is not None) == row.is_queued
    assert (stored.cancel_requested_at is not None) == row.is_unwanted
    is_ended = Status(stored.status).is_terminal
    places = [stored.queued_at, stored.lease_until, stored.not_before]
    assert sum(place is not None for place in places) == (0 if is_ended else 1)
    assert (stored.finished_at is not None) == is_ended


def _rank(task: Task) -> int:
    return 2 if task.status.is_terminal else ORDER.index(task.status)


@pytest.fixture
def fast_engine(tmp_path: Path) -> Iterator[Engine]:
    """A SQLite that flushes to nowhere: this is about logic, not about power cuts."""
    engine = open_database(f"sqlite:///{tmp_path / 'tasks.db'}")
    event.listen(engine, "connect", lambda dbapi, _: dbapi.execute("PRAGMA synchronous=OFF"))
    engine.dispose()  # its first connection was made before
    yield engine
    engine.dispose()


def check(engine: Engine, store_class: type[TaskStore], **options: Any) -> None:
    """Run the machine; options are those of ``hypothesis.settings``."""
    with patch.object(ledger, "_ROWS", 3):  # so that rows are added up often
        run_state_machine_as_test(
            lambda: StoreMachine(engine, store_class),
            settings=settings(
                deadline=None, suppress_health_check=list(HealthCheck), database=None, **options
            ),
        )


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.cluster)])
def either(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """The same, or PostgreSQL."""
    if request.param == "sqlite":
        yield request.getfixturevalue("fast_engine")
        return
    engine = open_database(request.getfixturevalue("postgres_url"))
    yield engine
    engine.dispose()


def test_store_behaves_like_its_model(either: Engine) -> None:
    # PostgreSQL takes several times as long for the same.
    examples, steps = (100, 25) if either.dialect.name == "sqlite" else (50, 8)
    check(either, TaskStore, max_examples=examples, stateful_step_count=steps, derandomize=True)


@pytest.mark.slow
def test_store_behaves_like_its_model_for_long(either: Engine) -> None:
    check(either, TaskStore, max_examples=1000, stateful_step_count=50)


# --- the model finds what is wrong ---------------------------------------------------------------


class Unfenced(TaskStore):
    """Takes a result from whoever brings it."""

    def finish(self, task_id: str, attempt: int, outcome: Outcome, **how: Any) -> bool:
        [task] = self.get([task_id])
        return super().finish(task_id, task.attempt if task else attempt, outcome, **how)


class Forgetful(TaskStore):
    """Never notices that a lease ran out."""

    def claim(self, owner: str, n: int = 1, *, like: str = "", **how: Any) -> list[Task]:
        now, self._clock = self._clock, lambda: 0.0
        try:
            return super().claim(owner, n, like=like)
        finally:
            self._clock = now


class Crowded(TaskStore):
    """One more than allowed."""

    def accept(self, new: Sequence[NewTask], *, max_open: int, **how: Any) -> list[Acceptance]:
        return super().accept(new, max_open=max_open + 1, **how)


class Patient(TaskStore):
    """Never gives a task up."""

    def release(self, owner: str, *, has_crashed: bool = True) -> int:
        return super().release(owner, has_crashed=False)


class Unfair(TaskStore):
    """First come, first served."""

    def claim(self, owner: str, n: int = 1, *, like: str = "", **how: Any) -> list[Task]:
        def oldest(db: Any, _priority: int, wanted: Any, lease: Any, _collided: Any) -> Any:
            return claiming._claim_oldest(db, wanted.ready, lease)

        with patch.object(claiming, "_claim_fairly", oldest):
            return super().claim(owner, n, like=like)


class Sociable(TaskStore):
    """Puts any tasks together."""

    def claim(self, owner: str, n: int = 1, *, like: str = "", **how: Any) -> list[Task]:
        return [task for _ in range(n) for task in super(Sociable, self).claim(owner, like=like)]


class Careless(TaskStore):
    """Does not look at what came with an idempotency key."""

    def accept(self, new: Sequence[NewTask], *, max_open: int, **how: Any) -> list[Acceptance]:
        return super().accept([replace(task, digest="") for task in new], max_open=max_open, **how)


class Silent(TaskStore):
    """Tells nobody of a task's end."""

    def accept(self, new: Sequence[NewTask], *, max_open: int, **how: Any) -> list[Acceptance]:
        new = [replace(task, webhook_url=None) for task in new]
        return super().accept(new, max_open=max_open, **how)


class Hasty(TaskStore):
    """Does not wait before it tries again."""

    def give_back(self, task_id: str, attempt: int, **how: Any) -> bool:
        return super().give_back(task_id, attempt, **{**how, "delay_s": 0.0})


class Deaf(TaskStore):
    """Does not pass on that a task was cancelled."""

    def renew(self, owner: str, held: Mapping[str, tuple[int, int]]) -> Lease:
        return replace(super().renew(owner, held), cancelled=frozenset())


class Obliging(TaskStore):
    """Cancels anyone's tasks for anyone."""

    def cancel(self, task_id: str, key_id: str) -> Cancellation | None:
        [task] = self.get([task_id])
        return super().cancel(task_id, task.key_id if task else key_id)


class Ruthless(TaskStore):
    """Deletes anyone's tasks for anyone."""

    def delete(self, ids: Sequence[str], *, key_id: str | None = None) -> list[str]:
        return super().delete(ids)


class Boundless(TaskStore):
    """Does not look at what a key stores."""

    def accept(self, new: Sequence[NewTask], *, max_open: int, **_: Any) -> list[Acceptance]:
        return super().accept(new, max_open=max_open)


class Wasteful(TaskStore):
    """Counts images as if they took all they may."""

    def finish(self, task_id: str, attempt: int, outcome: Outcome, **how: Any) -> bool:
        return super().finish(task_id, attempt, outcome, cost_s=how["cost_s"])


FAULTY = [
    Boundless,
    Wasteful,
    Unfenced,
    Forgetful,
    Crowded,
    Patient,
    Unfair,
    Sociable,
    Careless,
    Silent,
    Hasty,
    Deaf,
    Obliging,
    Ruthless,
]


@pytest.mark.parametrize("faulty", FAULTY)
def test_a_faulty_store_is_found_out(fast_engine: Engine, faulty: type[TaskStore]) -> None:
    with pytest.raises(AssertionError):
        check(
            fast_engine,
            faulty,
            max_examples=1000,  # it ends with the first that fails
            stateful_step_count=25,
            derandomize=True,
            phases=[Phase.generate],
            report_multiple_bugs=False,
        )
