"""TaskStore on either database, with a clock that the test turns."""

import multiprocessing
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event, insert

from redux_server.database.migration import open_database
from redux_server.database.tables import tasks
from redux_server.tasks.accepting import Bounds, IdempotencyKeys, free_places
from redux_server.tasks.store import LONGEST_DELAY_S, TaskStore
from redux_server.tasks.task import Code, Created, NewTask, NoRoom, Outcome, Status, Task
from server.in_process import Clock

LEASE_S = 30.0
DONE = Outcome(status=Status.COMPLETED, outputs=["a/1/0.png"], seeds=[7], timings={"inference": 5})
FAILED = Outcome.failure(Code.TASK_FAILED, "no")


@pytest.fixture
def engine(either_database: Engine) -> Engine:
    return either_database


ON_SQLITE = pytest.mark.parametrize("either_database", ["sqlite"], indirect=True)


@pytest.fixture
def store(engine: Engine, clock: Clock) -> TaskStore:
    return TaskStore(engine, lease_s=LEASE_S, clock=clock)


def new(name: str = "n") -> NewTask:
    return NewTask(key_id="key", model="m", input={"prompt": name}, request_id=f"r-{name}")


def add(store: TaskStore, count: int = 1, *, max_open: int = 1000) -> list[str]:
    accepted = store.accept([new(str(i)) for i in range(count)], max_open=max_open)
    return [each.task.id for each in accepted if isinstance(each, Created)]


def get(store: TaskStore, task_id: str) -> Task:
    [task] = store.get([task_id])
    assert task is not None
    return task


def claim(store: TaskStore, owner: str = "w") -> Task:
    (task,) = store.claim(owner)
    return task


def crash(store: TaskStore, times: int) -> None:
    """The worker dies this often, each time with the next task in its hands."""
    for _ in range(times):
        claim(store)
        store.release("w")


# --- accepting and reading -----------------------------------------------------------------------


def test_accepted_task_is_known_and_waits(store: TaskStore, clock: Clock) -> None:
    task = new("cat")
    [accepted] = store.accept([task], max_open=1)
    assert accepted == Created(get(store, task.id))
    assert get(store, task.id) == Task(
        id=task.id,
        key_id="key",
        model="m",
        status=Status.CREATED,
        input={"prompt": "cat"},
        request_id="r-cat",
        created_at=clock.now,
        started_at=None,
        finished_at=None,
        attempt=0,
        crashes=0,
        progress_step=0,
        outcome=None,
    )


def test_get_answers_in_the_order_asked_with_none_for_unknown_ids(store: TaskStore) -> None:
    first, second = add(store, 2)
    found = store.get([second, "unknown", first, second])
    assert [task and task.id for task in found] == [second, None, first, second]


def test_queue_bound_is_exact_within_a_batch(store: TaskStore) -> None:
    add(store, 3)
    batch = [new(str(i)) for i in range(5)]
    accepted = store.accept(batch, max_open=5)
    assert [each.task.id for each in accepted[:2]] == [task.id for task in batch[:2]]
    assert accepted[2:] == [NoRoom()] * 3
    assert store.queue_state().waiting == 5
    assert store.get([batch[2].id]) == [None]
    assert store.accept([new()], max_open=5) == [NoRoom()]


def test_running_tasks_count_against_the_queue_bound_and_ended_ones_do_not(
    store: TaskStore,
) -> None:
    add(store, 2)
    task = claim(store)
    assert add(store, max_open=2) == []
    store.finish(task.id, task.attempt, DONE)
    assert len(add(store, max_open=2)) == 1


def test_a_lowered_bound_accepts_nothing_and_does_not_fail(store: TaskStore) -> None:
    add(store, 3)
    assert store.accept([new()], max_open=1) == [NoRoom()]


def test_queue_bound_holds_under_many_threads(store: TaskStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        accepted = list(pool.map(lambda _: len(add(store, 7, max_open=50)), range(16)))
    assert sum(accepted) == 50
    assert store.queue_state().waiting == 50


# --- claiming ------------------------------------------------------------------------------------


def test_tasks_are_claimed_in_the_order_accepted(store: TaskStore, clock: Clock) -> None:
    ids = add(store, 3)
    clock.now += 1
    ids += add(store, 2)
    assert [claim(store).id for _ in ids] == ids
    assert store.claim("w") == []


def test_claimed_task_is_processing_under_its_first_attempt(store: TaskStore, clock: Clock) -> None:
    [task_id] = add(store)
    clock.now += 3
    task = claim(store)
    assert (task.status, task.attempt, task.started_at) == (Status.PROCESSING, 1, clock.now)
    assert task == get(store, task_id)


def test_no_task_is_claimed_twice_by_many_threads(store: TaskStore) -> None:
    ids = add(store, 60)
    start = threading.Barrier(8)

    def drain(number: int) -> list[str]:
        start.wait()
        claimed = []
        while some := store.claim(f"w{number}"):
            claimed += [task.id for task in some]
        return claimed

    with ThreadPoolExecutor(8) as pool:
        claimed = [task_id for some in pool.map(drain, range(8)) for task_id in some]
    assert sorted(claimed) == sorted(ids)


def _drain_in_process(url: str, owner: str, start: Any, claimed: Any) -> None:
    engine = open_database(url)
    store = TaskStore(engine)
    start.wait()
    found = []
    while some := store.claim(owner):
        found += [task.id for task in some]
    claimed.put(found)
    engine.dispose()


def test_no_task_is_claimed_twice_by_two_processes(engine: Engine) -> None:
    ids = add(TaskStore(engine), 100)
    spawn = multiprocessing.get_context("spawn")
    start, claimed = spawn.Barrier(2), spawn.Queue()
    processes = [
        spawn.Process(target=_drain_in_process, args=(str(engine.url), f"w{i}", start, claimed))
        for i in range(2)
    ]
    for process in processes:
        process.start()
    shares = [claimed.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(shares[0] + shares[1]) == sorted(ids)


def test_expired_lease_is_claimed_again_before_younger_tasks(
    store: TaskStore, clock: Clock
) -> None:
    [old] = add(store)
    clock.now += 1
    [young] = add(store)
    assert claim(store, "dead").id == old
    clock.now += LEASE_S + 0.001
    again = claim(store, "alive")
    assert (again.id, again.attempt) == (old, 2)
    assert claim(store, "alive").id == young


def test_lease_holds_until_its_last_moment(store: TaskStore, clock: Clock) -> None:
    add(store)
    claim(store, "first")
    clock.now += LEASE_S
    assert store.claim("second") == []


def test_new_attempt_starts_its_progress_anew(store: TaskStore) -> None:
    [task_id] = add(store)
    claim(store)
    store.renew("w", {task_id: (1, 9)})
    assert get(store, task_id).progress_step == 9
    store.release("w")
    assert claim(store).progress_step == 0


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
def test_tasks_stay_claimable_when_the_clock_is_set(
    store: TaskStore, clock: Clock, jump_s: float
) -> None:
    ids = set(add(store, 2))
    first = claim(store)
    clock.now += jump_s
    store.release("w")  # its worker is gone
    claimed = [claim(store), claim(store)]
    assert {task.id for task in claimed} == ids
    assert store.queue_state().oldest_waiting_s == 0.0
    assert all(store.finish(task.id, task.attempt, DONE) for task in claimed)
    assert not store.finish(first.id, first.attempt, DONE)


# --- ending --------------------------------------------------------------------------------------


def test_finish_stores_the_outcome(store: TaskStore, clock: Clock) -> None:
    add(store)
    task = claim(store)
    clock.now += 2
    assert store.finish(task.id, task.attempt, DONE)
    ended = get(store, task.id)
    assert (ended.status, ended.outcome, ended.finished_at) == (Status.COMPLETED, DONE, clock.now)


def test_zombie_cannot_finish_after_its_successor_claimed(store: TaskStore, clock: Clock) -> None:
    add(store)
    zombie = claim(store, "zombie")
    clock.now += LEASE_S + 1
    successor = claim(store, "successor")
    assert not store.finish(zombie.id, zombie.attempt, FAILED)
    assert get(store, zombie.id).status is Status.PROCESSING
    assert store.finish(successor.id, successor.attempt, DONE)
    assert not store.finish(zombie.id, zombie.attempt, FAILED)
    assert get(store, zombie.id).outcome == DONE


def test_finish_after_release_counts_once_while_nobody_claimed(store: TaskStore) -> None:
    add(store)
    task = claim(store)
    store.release("w")
    assert store.finish(task.id, task.attempt, DONE)
    assert not store.finish(task.id, task.attempt, FAILED)
    assert get(store, task.id).outcome == DONE
    assert store.claim("other") == []


def test_finish_after_expiry_counts_while_nobody_claimed(store: TaskStore, clock: Clock) -> None:
    add(store)
    task = claim(store)
    clock.now += 10 * LEASE_S
    assert store.finish(task.id, task.attempt, DONE)
    assert store.claim("other") == []


def test_task_that_was_never_claimed_cannot_be_finished(store: TaskStore) -> None:
    [task_id] = add(store)
    assert not store.finish(task_id, 0, DONE)
    assert not store.finish("unknown", 1, DONE)
    assert get(store, task_id).status is Status.CREATED


@pytest.mark.parametrize("outcome", [DONE, FAILED, Outcome(status=Status.CANCELLED)])
def test_ended_task_never_changes(store: TaskStore, clock: Clock, outcome: Outcome) -> None:
    add(store)
    task = claim(store)
    store.finish(task.id, task.attempt, outcome)
    ended = get(store, task.id)
    clock.now += LEASE_S * 2
    for attempt in range(4):
        assert not store.finish(task.id, attempt, FAILED)
        assert store.renew("w", {task.id: (attempt, 1)}).lost == {task.id}
    assert store.release("w") == 0
    assert store.claim("w") == []
    assert get(store, task.id) == ended


def test_status_never_goes_back_to_created(store: TaskStore) -> None:
    [task_id] = add(store)
    claim(store)
    store.release("w")
    assert get(store, task_id).status is Status.PROCESSING
    assert store.queue_state().waiting == 1


# --- heartbeats and death ------------------------------------------------------------------------


def test_renew_extends_the_lease(store: TaskStore, clock: Clock) -> None:
    add(store)
    task = claim(store)
    for step in range(5):
        clock.now += LEASE_S - 1
        assert store.renew("w", {task.id: (1, step)}).lost == frozenset()
        assert store.claim("other") == []
    assert get(store, task.id).progress_step == 4


HOUR_S = 3600.0


def test_tasks_of_an_hour_that_was_too_early_wait_for_no_younger_ones(
    store: TaskStore, clock: Clock
) -> None:
    clock.now += HOUR_S
    early = add(store, 2)
    clock.now -= HOUR_S
    add(store, 2)
    assert store.catch_up() == 2
    clock.now += 0.1
    younger = add(store)
    order = [claim(store).id for _ in range(5)]
    assert [task_id for task_id in order if task_id in early] == early
    assert order[-1:] == younger
    assert store.catch_up() == 0


def test_a_delay_of_an_hour_that_was_too_early_is_over(store: TaskStore, clock: Clock) -> None:
    [task_id] = add(store)
    clock.now += HOUR_S
    claim(store)
    store.give_back(task_id, 1, delay_s=5.0)
    clock.now -= HOUR_S
    assert store.claim("w") == []
    assert store.catch_up() == 1
    assert claim(store).id == task_id


def test_a_lease_of_an_hour_that_was_too_early_runs_out_in_its_time(
    store: TaskStore, clock: Clock
) -> None:
    [task_id] = add(store)
    clock.now += HOUR_S
    claim(store, "lost")
    clock.now -= HOUR_S
    assert store.catch_up() == 1
    assert store.renew("lost", {task_id: (1, 1)}).lost == frozenset()  # it may still be there
    clock.now += LEASE_S + 1
    assert claim(store, "next").id == task_id


def test_times_that_are_set_as_ever_are_left_alone(store: TaskStore, clock: Clock) -> None:
    add(store, 3)
    claim(store)
    waiting = claim(store)
    store.give_back(waiting.id, 1, delay_s=LONGEST_DELAY_S)
    clock.now -= 30  # clocks differ a little
    assert store.catch_up() == 0


def test_a_lease_is_renewed_by_its_holder_only(store: TaskStore, clock: Clock) -> None:
    add(store)
    task = claim(store, "holder")
    clock.now += LEASE_S - 1
    assert store.renew("other", {task.id: (1, 1)}).lost == {task.id}
    clock.now += 2
    assert claim(store, "next").id == task.id  # the other's word has not kept it


def test_renew_reports_what_was_lost_and_keeps_the_rest(store: TaskStore, clock: Clock) -> None:
    add(store, 3)
    kept, lost, ended = claim(store), claim(store), claim(store)
    clock.now += LEASE_S - 1
    store.renew("w", {kept.id: (1, 1)})
    store.finish(ended.id, 1, DONE)
    clock.now += 2
    assert claim(store, "other").id == lost.id
    held = {task.id: (1, 2) for task in (kept, lost, ended)}
    assert store.renew("w", held).lost == {lost.id, ended.id}
    assert get(store, kept.id).progress_step == 2
    assert get(store, lost.id).progress_step == 0


def test_earlier_attempt_of_the_same_worker_is_lost(store: TaskStore, clock: Clock) -> None:
    add(store)
    first = claim(store)
    clock.now += LEASE_S + 1
    second = claim(store)
    assert (second.id, second.attempt) == (first.id, 2)
    assert store.renew("w", {first.id: (1, 1)}).lost == {first.id}
    assert store.renew("w", {first.id: (2, 1)}).lost == frozenset()


def test_release_returns_only_the_dead_workers_tasks(store: TaskStore) -> None:
    ids = add(store, 3)
    claim(store, "dead"), claim(store, "alive"), claim(store, "dead")
    assert store.release("dead") == 2
    assert store.release("dead") == 0
    assert (store.queue_state().waiting, store.queue_state().running) == (2, 1)
    assert [claim(store).id for _ in range(2)] == [ids[0], ids[2]]


def test_poison_task_fails_after_its_last_attempt_with_a_clear_reason(
    engine: Engine, clock: Clock
) -> None:
    store = TaskStore(engine, max_attempts=3, clock=clock)
    [poison] = add(store)
    crash(store, times=2)
    assert get(store, poison).status is Status.PROCESSING
    crash(store, times=1)
    ended = get(store, poison)
    assert (ended.status, ended.attempt, ended.finished_at) == (Status.FAILED, 3, clock.now)
    assert ended.outcome == Outcome.failure(
        Code.INTERNAL, "The worker stopped unexpectedly 3 times during this task."
    )
    assert store.claim("w") == []


def test_poison_task_fails_when_its_last_lease_runs_out(engine: Engine, clock: Clock) -> None:
    store = TaskStore(engine, lease_s=LEASE_S, max_attempts=2, clock=clock)
    [poison] = add(store)
    clock.now += 1
    [neighbour] = add(store)
    crash(store, times=1)
    assert claim(store).id == poison
    clock.now += LEASE_S + 1
    assert claim(store).id == neighbour
    assert get(store, poison).status is Status.FAILED


def test_worker_that_was_told_to_go_gives_up_no_task(engine: Engine) -> None:
    store = TaskStore(engine, max_attempts=2)
    [task_id] = add(store)
    for _ in range(5):
        claim(store)
        assert store.release("w", has_crashed=False) == 1
    assert get(store, task_id).status is Status.PROCESSING
    assert claim(store).attempt == 6


def test_planned_stops_do_not_count_towards_giving_up(engine: Engine) -> None:
    store = TaskStore(engine, max_attempts=2)
    [task_id] = add(store)
    for _ in range(5):
        claim(store)
        store.release("w", has_crashed=False)
    crash(store, times=1)
    assert get(store, task_id).status is Status.PROCESSING
    assert get(store, task_id).crashes == 1
    crash(store, times=1)
    assert get(store, task_id).status is Status.FAILED


# --- keeping house -------------------------------------------------------------------------------


def test_ended_before_lists_the_oldest_first_and_only_ended_ones(
    store: TaskStore, clock: Clock
) -> None:
    ids = add(store, 4)
    for _ in range(3):
        task = claim(store)
        store.finish(task.id, task.attempt, DONE)
        clock.now += 10
    assert store.ended_before(clock.now) == ids[:3]
    assert store.ended_before(clock.now - 10) == ids[:2]
    assert store.ended_before(clock.now, limit=1) == ids[:1]


def test_deleted_tasks_are_unknown_and_others_stay(store: TaskStore) -> None:
    ids = add(store, 3)
    store.delete(ids[:2])
    store.delete([])
    assert [task and task.id for task in store.get(ids)] == [None, None, ids[2]]


def test_queue_state_counts_and_ages(store: TaskStore, clock: Clock) -> None:
    state = store.queue_state()
    assert (state.waiting, state.running, state.oldest_waiting_s) == (0, 0, 0.0)
    add(store, 3)
    clock.now += 5
    claim(store)
    state = store.queue_state()
    assert (state.waiting, state.running) == (2, 1)
    assert state.oldest_waiting_s == pytest.approx(5.0, abs=0.001)


# --- the database underneath ---------------------------------------------------------------------


@ON_SQLITE
def test_connections_in_use_flush_every_commit_to_disk(store: TaskStore, engine: Engine) -> None:
    seen: list[tuple[str, int]] = []

    def look(connection: Any) -> None:
        cursor = connection.connection.driver_connection
        [mode], [level] = (
            cursor.execute(f"PRAGMA {name}").fetchone() for name in ("journal_mode", "synchronous")
        )
        seen.append((mode, level))

    event.listen(engine, "commit", look)
    add(store)
    claim(store)
    assert seen == [("wal", 2)] * 2  # 2 is FULL


@ON_SQLITE
def test_committed_tasks_are_visible_to_a_new_connection(store: TaskStore, tmp_path: Path) -> None:
    ids = add(store, 3)
    copy = sqlite3.connect(f"file:{tmp_path / 'tasks.db'}?mode=ro", uri=True)
    try:
        assert {row[0] for row in copy.execute("SELECT id FROM tasks")} == set(ids)
    finally:
        copy.close()


@ON_SQLITE
def test_idle_claim_and_reads_begin_no_write_transaction(store: TaskStore, engine: Engine) -> None:
    statements: list[str] = []
    event.listen(
        engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2])
    )
    [task_id] = add(store)
    task = claim(store)
    assert "BEGIN IMMEDIATE" in statements
    statements.clear()
    assert store.claim("other") == []  # leased, not expired
    store.finish(task_id, task.attempt, DONE)
    statements.clear()
    assert store.claim("other") == []  # nothing left
    store.get([task_id])
    store.queue_state()
    store.ended_before(0.0)
    assert statements
    assert not [s for s in statements if "IMMEDIATE" in s or not s.startswith(("BEGIN", "SELECT"))]


@ON_SQLITE
def test_idle_claim_does_not_wait_for_a_writer(store: TaskStore, engine: Engine) -> None:
    add(store)
    claim(store)
    with engine.begin():  # holds the write lock
        assert store.claim("other") == []


@ON_SQLITE
@pytest.mark.parametrize("finished_at", [None, 5.0], ids=["queued", "ended"])
def test_no_statement_reads_a_table_of_20_000_rows(
    store: TaskStore, engine: Engine, finished_at: float | None
) -> None:
    keys = [f"key-{i}" for i in range(40)]
    rows = [{**_row(i), "finished_at": finished_at, "key_id": keys[i % 40]} for i in range(20_000)]
    if finished_at is not None:
        rows = [{**row, "queued_at": None, "status": Status.COMPLETED} for row in rows]
    with engine.begin() as db:
        db.execute(insert(tasks), rows)
    statements: dict[str, Any] = {}

    def note(_connection: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        if statement.startswith(("SELECT", "UPDATE", "DELETE", "WITH")):
            statements[statement] = values

    event.listen(engine, "before_cursor_execute", note)
    claimed = store.claim("w")
    assert [task.id for task in claimed] == ([] if finished_at else [rows[0]["id"]])
    store.claim("w", 3, like="s")
    idempotent = replace(new(), idempotency_key="i")
    store.accept([new(), idempotent], max_open=30_000)
    IdempotencyKeys(engine).recall(idempotent)
    IdempotencyKeys(engine).knows(keys[0], "i")
    free_places(engine, keys[:2], bounds=Bounds(30_000, 3))
    store.cancel(rows[2]["id"], keys[2])
    store.give_back(rows[0]["id"], 1, delay_s=5)
    store.delete([rows[3]["id"]], key_id=keys[3])
    store.renew("w", {rows[0]["id"]: (1, 1)})
    store.finish(rows[1]["id"], 1, DONE)
    store.release("w")
    store.queue_state()
    store.ended_before(1.0)
    IdempotencyKeys(engine).forget(1.0)
    for statement, values in list(statements.items()):
        # A recursive query's own rows are one for each key that waits or has open tasks: these are
        # read and sorted.
        is_of_keys = statement.startswith("WITH RECURSIVE")
        for step in _plan(engine, statement, values):
            # "(subquery-1)" is what `IN ()` becomes, and has no row.
            is_harmless = step in ("SCAN CONSTANT ROW", "SCAN (subquery-1)") or (
                is_of_keys and step in ("SCAN waiting", "SCAN active")
            )
            assert is_harmless or not step.startswith("SCAN"), (statement, step)
            assert is_of_keys or "TEMP B-TREE" not in step, (statement, step)


def _row(number: int) -> dict[str, Any]:
    return {
        "id": f"{number:032x}",
        "key_id": "key",
        "model": "m",
        "status": Status.CREATED,
        "input": {},
        "request_id": "",
        "created_at": float(number),
        "queued_at": float(number),
    }


def _plan(engine: Engine, statement: str, values: Any) -> list[str]:
    with engine.connect() as db:
        rows = db.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values).all()
    return [str(row.detail) for row in rows]
