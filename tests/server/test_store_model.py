"""TaskStore against a model of it in plain Python, over histories that hypothesis invents."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from sqlalchemy import Engine, delete, event, select

from redux_server.database import open_database, tasks
from redux_server.store import TaskStore
from redux_server.tasks import NewTask, Outcome, Status, Task

LEASE_S = 10.0
MAX_ATTEMPTS = 3
MAX_OPEN = 6
OWNERS = st.sampled_from(["anna", "bela"])
OUTCOMES = st.sampled_from(
    [
        Outcome(status=Status.COMPLETED, outputs=["0.png"], seeds=[1]),
        Outcome.failure(1402, "no picture"),
        Outcome(status=Status.CANCELLED),
    ]
)
ORDER = [Status.CREATED, Status.PROCESSING, Status.COMPLETED]


@dataclass
class Row:
    """What the model knows of a task; ``place`` is its place in the queue, for good."""

    id: str
    place: int
    status: Status = Status.CREATED
    attempt: int = 0
    crashes: int = 0
    owner: str | None = None
    lease_until: float | None = None
    is_queued: bool = True
    outcome: Outcome | None = None


class Model:
    """The queue's rules, without SQL, threads or transactions."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.rows: dict[str, Row] = {}

    def open(self) -> list[Row]:
        return [row for row in self.rows.values() if not row.status.is_terminal]

    def accept(self, ids: list[str]) -> int:
        room = max(0, MAX_OPEN - len(self.open()))
        for task_id in ids[:room]:
            self.rows[task_id] = Row(task_id, place=len(self.rows))
        return min(room, len(ids))

    def claim(self, owner: str) -> Row | None:
        self.take_back([r for r in self.leased() if (r.lease_until or 0.0) < self.now])
        waiting = sorted((r for r in self.open() if r.is_queued), key=lambda row: row.place)
        if not waiting:
            return None
        row = waiting[0]
        row.status, row.owner, row.is_queued = Status.PROCESSING, owner, False
        row.attempt += 1
        row.lease_until = self.now + LEASE_S
        return row

    def leased(self) -> list[Row]:
        return [row for row in self.rows.values() if row.lease_until is not None]

    def take_back(self, rows: list[Row], *, has_crashed: bool = True) -> int:
        for row in rows:
            row.lease_until = None
            row.crashes += has_crashed
            if has_crashed and row.crashes >= MAX_ATTEMPTS:
                text = f"The worker stopped unexpectedly {MAX_ATTEMPTS} times during this task."
                self.end(row, Outcome.failure(5000, text))
            else:
                row.is_queued, row.owner = True, None
        return len(rows)

    def end(self, row: Row, outcome: Outcome) -> None:
        row.status, row.outcome = outcome.status, outcome
        row.is_queued, row.lease_until = False, None

    def finish(self, task_id: str, attempt: int, outcome: Outcome) -> bool:
        row = self.rows[task_id]
        if row.status is not Status.PROCESSING or row.attempt != attempt:
            return False
        self.end(row, outcome)
        return True

    def renew(self, owner: str, held: dict[str, int]) -> set[str]:
        lost = set()
        for task_id, attempt in held.items():
            row = self.rows[task_id]
            if (row.owner, row.attempt) == (owner, attempt) and row.lease_until is not None:
                row.lease_until = self.now + LEASE_S
            else:
                lost.add(task_id)
        return lost


@dataclass(frozen=True)
class Claimed:
    """What a worker remembers of a claim, long after it may have lost it."""

    id: str
    attempt: int


class StoreMachine(RuleBasedStateMachine):
    """Each rule does the same to both; the invariants compare what is left."""

    claims = Bundle("claims")

    def __init__(self, engine: Engine, store_class: type[TaskStore]) -> None:
        super().__init__()
        with engine.begin() as db:
            db.execute(delete(tasks))
        self.engine = engine
        self.model = Model()
        self.store = store_class(
            engine, lease_s=LEASE_S, max_attempts=MAX_ATTEMPTS, clock=lambda: self.model.now
        )
        self.seen: dict[str, Task] = {}

    @rule(count=st.integers(1, 4))
    def accept(self, count: int) -> None:
        new = [NewTask(key_id="k", model="m", input={"n": n}) for n in range(count)]
        accepted = self.store.accept(new, max_open=MAX_OPEN)
        fitted = self.model.accept([task.id for task in new])
        assert [task is not None for task in accepted] == [n < fitted for n in range(count)]

    @rule(target=claims, owner=OWNERS)
    def claim(self, owner: str) -> Any:
        got, expected = self.store.claim(owner), self.model.claim(owner)
        assert (got and (got.id, got.attempt)) == (expected and (expected.id, expected.attempt))
        return Claimed(got.id, got.attempt) if got else multiple()

    @rule(target=claims, owner=OWNERS)
    def worker_crashes_at_its_next_task(self, owner: str) -> Any:
        claimed = self.claim(owner)
        self.worker_is_gone(owner, has_crashed=True)
        return claimed

    @rule(claim=claims, outcome=OUTCOMES)
    def finish(self, claim: Claimed, outcome: Outcome) -> None:
        done = self.store.finish(claim.id, claim.attempt, outcome)
        assert done == self.model.finish(claim.id, claim.attempt, outcome)

    @rule(owner=OWNERS, held=st.lists(claims, max_size=3))
    def renew(self, owner: str, held: list[Claimed]) -> None:
        attempts = {claim.id: claim.attempt for claim in held}
        lost = self.store.renew(owner, {key: (attempt, 7) for key, attempt in attempts.items()})
        assert lost.lost == self.model.renew(owner, attempts)

    @rule(owner=OWNERS, has_crashed=st.booleans())
    def worker_is_gone(self, owner: str, has_crashed: bool) -> None:
        held = [row for row in self.model.leased() if row.owner == owner]
        released = self.store.release(owner, has_crashed=has_crashed)
        assert released == self.model.take_back(held, has_crashed=has_crashed)

    @rule(seconds=st.sampled_from([0.5, LEASE_S, LEASE_S + 1, 3 * LEASE_S]))
    def time_passes(self, seconds: float) -> None:
        self.model.now += seconds

    @rule()
    def server_restarts(self) -> None:
        """Nothing that matters is in the store's memory."""
        self.engine.dispose()

    @invariant()
    def rows_are_as_the_model_says(self) -> None:
        with self.engine.connect() as db:
            found = {row.id: row for row in db.execute(select(tasks))}
        assert found.keys() == self.model.rows.keys()  # accepted is known, and nothing else
        for row in self.model.rows.values():
            stored = found[row.id]
            assert (stored.status, stored.attempt) == (row.status, row.attempt)
            assert stored.lease_until == row.lease_until
            assert (stored.queued_at is not None) == row.is_queued
            assert stored.queued_at is None or stored.lease_until is None
            is_ended = Status(stored.status).is_terminal
            is_open = stored.queued_at is not None or stored.lease_until is not None
            assert is_open != is_ended
            assert (stored.finished_at is not None) == is_ended
        assert len(self.model.open()) <= MAX_OPEN
        state = self.store.queue_state()
        assert state.running == len(self.model.leased())
        assert state.waiting + state.running == len(self.model.open())

    @invariant()
    def clients_see_no_step_back(self) -> None:
        ids = list(self.model.rows)
        for task in self.store.get(ids):
            assert task is not None
            assert task.outcome == self.model.rows[task.id].outcome
            before = self.seen.get(task.id, task)
            assert _rank(task) >= _rank(before)
            if before.status.is_terminal:
                assert task == before
            self.seen[task.id] = task


def _rank(task: Task) -> int:
    return 2 if task.status.is_terminal else ORDER.index(task.status)


@pytest.fixture
def fast_engine(tmp_path: Path) -> Iterator[Engine]:
    """A database that flushes to nowhere: this is about logic, not about power cuts."""
    engine = open_database(f"sqlite:///{tmp_path / 'tasks.db'}")
    event.listen(engine, "connect", lambda dbapi, _: dbapi.execute("PRAGMA synchronous=OFF"))
    engine.dispose()  # its first connection was made before
    yield engine
    engine.dispose()


def check(engine: Engine, store_class: type[TaskStore], **options: Any) -> None:
    """Run the machine; options are those of ``hypothesis.settings``."""
    run_state_machine_as_test(
        lambda: StoreMachine(engine, store_class),
        settings=settings(
            deadline=None, suppress_health_check=list(HealthCheck), database=None, **options
        ),
    )


def test_store_behaves_like_its_model(fast_engine: Engine) -> None:
    check(fast_engine, TaskStore, max_examples=200, stateful_step_count=25, derandomize=True)


@pytest.mark.slow
def test_store_behaves_like_its_model_for_long(fast_engine: Engine) -> None:
    check(fast_engine, TaskStore, max_examples=1000, stateful_step_count=50)


# --- the model finds what is wrong ---------------------------------------------------------------


class Unfenced(TaskStore):
    """Takes a result from whoever brings it."""

    def finish(self, task_id: str, attempt: int, outcome: Outcome) -> bool:
        [task] = self.get([task_id])
        assert task is not None
        return super().finish(task_id, task.attempt, outcome)


class Forgetful(TaskStore):
    """Never notices that a lease ran out."""

    def claim(self, owner: str) -> Task | None:
        now, self._clock = self._clock, lambda: 0.0
        try:
            return super().claim(owner)
        finally:
            self._clock = now


class Crowded(TaskStore):
    """One more than allowed."""

    def accept(self, new: Sequence[NewTask], *, max_open: int) -> list[Task | None]:
        return super().accept(new, max_open=max_open + 1)


class Patient(TaskStore):
    """Never gives a task up."""

    def release(self, owner: str, *, has_crashed: bool = True) -> int:
        return super().release(owner, has_crashed=False)


@pytest.mark.parametrize("faulty", [Unfenced, Forgetful, Crowded, Patient])
def test_a_faulty_store_is_found_out(fast_engine: Engine, faulty: type[TaskStore]) -> None:
    with pytest.raises(AssertionError):
        check(
            fast_engine,
            faulty,
            max_examples=200,
            stateful_step_count=25,
            derandomize=True,
            phases=[Phase.generate],
            report_multiple_bugs=False,
        )
