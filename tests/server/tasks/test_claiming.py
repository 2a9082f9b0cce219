"""Who is served next, what goes together, and what waits: on SQLite and on PostgreSQL."""

from collections import Counter

import pytest
from sqlalchemy import Engine, select, update

from redux_server.api.auth import KeyRing
from redux_server.database.tables import tasks, webhooks
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import Created, NewTask, Outcome, Status, Task
from server.in_process import Clock

LEASE_S = 30.0
DONE = Outcome(status=Status.COMPLETED, outputs=["x/1/0.png"], seeds=[1])


@pytest.fixture
def engine(either_database: Engine) -> Engine:
    return either_database


@pytest.fixture
def store(engine: Engine, clock: Clock) -> TaskStore:
    return TaskStore(engine, lease_s=LEASE_S, max_attempts=3, clock=clock)


def add(
    store: TaskStore, clock: Clock, key: str, count: int = 1, *, shape: str = "", webhook: str = ""
) -> list[str]:
    clock.now += 1
    new = [NewTask(key, "m", {}, shape=shape, webhook_url=webhook or None) for _ in range(count)]
    accepted = store.accept(new, max_open=10_000)
    assert all(isinstance(each, Created) for each in accepted)
    return [task.id for task in new]


def claim(store: TaskStore, clock: Clock, owner: str = "w") -> Task:
    clock.now += 1
    (task,) = store.claim(owner)
    return task


def status(store: TaskStore, task_id: str) -> Status:
    (task,) = store.get([task_id])
    assert task is not None
    return task.status


# --- fair between keys ----------------------------------------------------------------------------


def test_key_with_the_fewest_running_tasks_is_served_first(store: TaskStore, clock: Clock) -> None:
    add(store, clock, "flood", 10)
    add(store, clock, "late", 2)
    served = [claim(store, clock).key_id for _ in range(6)]
    assert served == ["flood", "late", "flood", "late", "flood", "flood"]


def test_one_worker_that_finishes_each_task_serves_keys_in_turn(
    store: TaskStore, clock: Clock
) -> None:
    """Nothing runs when it claims, so what counts is whose last task started longest ago."""
    add(store, clock, "flood", 50)
    for key in ("b", "c", "d"):
        add(store, clock, key, 10)
    served: Counter[str] = Counter()
    for _ in range(20):
        task = claim(store, clock)
        served[task.key_id] += 1
        assert store.finish(task.id, task.attempt, DONE)
    assert served == {"flood": 5, "b": 5, "c": 5, "d": 5}


def test_share_of_each_key_is_the_same_however_many_tasks_it_sends(
    store: TaskStore, clock: Clock
) -> None:
    """Ten times as many tasks, or one at a time: each of three keys gets a third."""
    add(store, clock, "flood", 200)
    add(store, clock, "steady", 40)
    served: Counter[str] = Counter()
    running: list[Task] = []
    for _ in range(90):
        if served["trickle"] == 0 or not any(task.key_id == "trickle" for task in running):
            add(store, clock, "trickle")
        running += [claim(store, clock)]
        served[running[-1].key_id] += 1
        if len(running) == 3:
            task = running.pop(0)
            assert store.finish(task.id, task.attempt, DONE)
    assert all(abs(count - 30) <= 6 for count in served.values()), served


def test_tasks_of_one_key_keep_their_order(store: TaskStore, clock: Clock) -> None:
    mine = add(store, clock, "a", 3) + add(store, clock, "a", 2)
    add(store, clock, "b", 4)
    claimed = [claim(store, clock) for _ in range(9)]
    assert [task.id for task in claimed if task.key_id == "a"] == mine


# --- priorities -----------------------------------------------------------------------------------


def test_tasks_have_the_priority_that_their_key_had_when_they_came(
    engine: Engine, store: TaskStore, clock: Clock
) -> None:
    ring = KeyRing(engine)
    ring.create("low", priority=-5)
    ring.create("high", priority=7)
    ids = {key.name: key.id for key in ring.list()}
    for key in (ids["low"], "file:team", ids["high"]):
        add(store, clock, key, 2)
    assert [claim(store, clock).key_id for _ in range(6)] == [
        *[ids["high"]] * 2,
        *["file:team"] * 2,
        *[ids["low"]] * 2,
    ]


# --- several at once ------------------------------------------------------------------------------


def test_tasks_of_one_shape_are_claimed_together(store: TaskStore, clock: Clock) -> None:
    ids = [add(store, clock, "a", shape=shape)[0] for shape in "stsss"]
    claimed = store.claim("w", 3)
    assert [task.id for task in claimed] == [ids[0], ids[2], ids[3]]
    assert {(task.status, task.attempt, task.started_at) for task in claimed} == {
        (Status.PROCESSING, 1, clock.now)
    }
    assert [task.id for task in store.claim("w", 3)] == [ids[1]]
    assert [task.id for task in store.claim("w", 3)] == [ids[4]]
    assert store.claim("w", 3) == []


def test_company_is_fair_too(store: TaskStore, clock: Clock) -> None:
    add(store, clock, "flood", 10, shape="s")
    add(store, clock, "late", 10, shape="s")
    assert Counter(task.key_id for task in store.claim("w", 4)) == {"flood": 2, "late": 2}


def test_like_finds_only_its_shape(store: TaskStore, clock: Clock) -> None:
    (one,) = add(store, clock, "a", shape="s")
    (two,) = add(store, clock, "b", shape="t")
    assert store.claim("w", like="u") == []
    assert [task.id for task in store.claim("w", 2, like="t")] == [two]
    assert [task.id for task in store.claim("w", 2)] == [one]


def test_what_may_have_killed_its_worker_is_alone_from_then_on(
    store: TaskStore, clock: Clock
) -> None:
    suspect, *others = add(store, clock, "a", 3, shape="s")
    assert claim(store, clock, "dead").id == suspect
    store.release("dead")
    assert [task.id for task in store.claim("w", 3)] == [suspect]
    assert [task.id for task in store.claim("w", 3, like="s")] == others


def test_tasks_without_a_shape_are_alone(store: TaskStore, clock: Clock) -> None:
    add(store, clock, "a", 2)
    assert len(store.claim("w", 2)) == 1


# --- given back -----------------------------------------------------------------------------------


def test_given_back_task_waits_for_its_time_and_has_its_old_place(
    store: TaskStore, clock: Clock
) -> None:
    first, second = add(store, clock, "a", 2)
    task = claim(store, clock)
    assert store.give_back(task.id, task.attempt, delay_s=10)
    assert (store.queue_state().waiting, store.queue_state().running) == (2, 0)
    assert status(store, first) is Status.PROCESSING
    assert claim(store, clock).id == second
    assert store.claim("w") == []
    clock.now += 9
    again = claim(store, clock)
    assert (again.id, again.attempt, again.crashes) == (first, 2, 0)


def test_only_who_holds_a_task_can_give_it_back(store: TaskStore, clock: Clock) -> None:
    (task_id,) = add(store, clock, "a")
    assert not store.give_back(task_id, 0)
    claim(store, clock)
    clock.now += LEASE_S + 1
    claim(store, clock, "other")
    assert not store.give_back(task_id, 1)
    assert store.give_back(task_id, 2)
    assert not store.give_back(task_id, 2)


def test_task_that_is_given_back_too_often_fails_for_the_last_reason(
    store: TaskStore, clock: Clock
) -> None:
    (task_id,) = add(store, clock, "a")
    for _ in range(5):  # these do not count
        task = claim(store, clock)
        store.give_back(task.id, task.attempt)
    for reason in ("first", "second", "out of memory"):
        task = claim(store, clock)
        assert store.give_back(task.id, task.attempt, error=reason, has_crashed=True)
    (task,) = store.get([task_id])
    assert task is not None and task.outcome is not None
    assert (task.status, task.outcome.error) == (Status.FAILED, "out of memory")


def test_delayed_tasks_count_against_the_bound_of_the_queue(store: TaskStore, clock: Clock) -> None:
    add(store, clock, "a")
    task = claim(store, clock)
    store.give_back(task.id, task.attempt, delay_s=60)
    (answer,) = store.accept([NewTask("a", "m", {})], max_open=1)
    assert not isinstance(answer, Created)


# --- cancelled and deleted ------------------------------------------------------------------------


def test_waiting_task_is_cancelled_at_once(store: TaskStore, clock: Clock) -> None:
    (task_id,) = add(store, clock, "a")
    cancelled = store.cancel(task_id, "a")
    assert cancelled is not None and cancelled.has_ended_it
    assert (cancelled.task.status, cancelled.task.finished_at) == (Status.CANCELLED, clock.now)
    assert cancelled.task.outcome is not None and cancelled.task.outcome.error
    assert store.claim("w") == []
    assert store.queue_state().waiting == 0


@pytest.mark.parametrize("delay_s", [0.0, 60.0])
def test_task_that_came_back_is_cancelled_at_once(
    store: TaskStore, clock: Clock, delay_s: float
) -> None:
    (task_id,) = add(store, clock, "a")
    task = claim(store, clock)
    store.give_back(task.id, task.attempt, delay_s=delay_s)
    store.cancel(task_id, "a")
    assert not store.finish(task.id, task.attempt, DONE)
    clock.now += 100
    assert store.claim("w") == []
    assert status(store, task_id) is Status.CANCELLED


def test_worker_learns_by_its_heartbeat_that_its_task_is_cancelled(
    store: TaskStore, clock: Clock
) -> None:
    add(store, clock, "a", 2)
    one, two = claim(store, clock), claim(store, clock)
    cancelled = store.cancel(one.id, "a")
    assert cancelled is not None and not cancelled.has_ended_it
    assert status(store, one.id) is Status.PROCESSING
    lease = store.renew("w", {one.id: (1, 3), two.id: (1, 3)})
    assert (lease.lost, lease.cancelled) == (set(), {one.id})
    assert store.finish(one.id, 1, Outcome.cancellation())
    assert status(store, one.id) is Status.CANCELLED


@pytest.mark.parametrize("how", ["crash", "stop", "silence"])
def test_cancelled_task_is_not_done_again_when_its_worker_goes(
    store: TaskStore, clock: Clock, how: str
) -> None:
    (task_id,) = add(store, clock, "a")
    claim(store, clock)
    store.cancel(task_id, "a")
    if how == "silence":
        clock.now += LEASE_S + 1
    else:
        store.release("w", has_crashed=how == "crash")
    assert store.claim("other") == []
    assert status(store, task_id) is Status.CANCELLED


def test_result_that_was_there_before_the_cancel_was_noticed_counts(
    store: TaskStore, clock: Clock
) -> None:
    (task_id,) = add(store, clock, "a")
    claim(store, clock)
    store.cancel(task_id, "a")
    assert store.finish(task_id, 1, DONE)
    late = store.cancel(task_id, "a")
    assert late is not None and not late.has_ended_it
    assert (late.task.status, late.task.outcome) == (Status.COMPLETED, DONE)


def test_deleted_task_is_lost_to_its_worker_and_stays_gone(store: TaskStore, clock: Clock) -> None:
    (task_id,) = add(store, clock, "a")
    claim(store, clock)
    assert store.delete([task_id], key_id="b") == []
    assert store.delete([task_id, task_id], key_id="a") == [task_id]
    assert store.renew("w", {task_id: (1, 1)}).lost == {task_id}
    assert not store.finish(task_id, 1, DONE)
    assert store.get([task_id]) == [None]
    assert store.queue_state().running == 0


# --- the outbox -----------------------------------------------------------------------------------


def outbox(engine: Engine) -> list[tuple[str, str, str, float, float]]:
    columns = [webhooks.c[n] for n in ("task_id", "key_id", "url", "created_at", "next_at")]
    with engine.connect() as db:
        return [tuple(row) for row in db.execute(select(*columns))]


@pytest.mark.parametrize("outcome", [DONE, Outcome.failure(1403, "no")])
def test_end_and_its_message_come_together(
    engine: Engine, store: TaskStore, clock: Clock, outcome: Outcome
) -> None:
    (task_id,) = add(store, clock, "a", webhook="https://example.com/h")
    add(store, clock, "a")
    claim(store, clock)
    assert outbox(engine) == []
    assert store.finish(task_id, 1, outcome)
    assert not store.finish(task_id, 1, outcome)
    at = clock.now
    quiet = claim(store, clock)
    store.finish(quiet.id, 1, outcome)
    assert outbox(engine) == [(task_id, "a", "https://example.com/h", at, at)]


def test_task_that_is_given_up_is_told_of_and_a_cancelled_one_is_not(
    engine: Engine, clock: Clock
) -> None:
    store = TaskStore(engine, max_attempts=1, clock=clock)
    poison, unwanted = add(store, clock, "a", 2, webhook="https://example.com/h")
    claim(store, clock)
    store.release("w")
    store.cancel(unwanted, "a")
    assert [row[0] for row in outbox(engine)] == [poison]
    store.delete([poison])
    assert outbox(engine) == []


# --- collisions -----------------------------------------------------------------------------------


@pytest.mark.cluster
@pytest.mark.parametrize("either_database", ["postgresql"], indirect=True)
def test_rows_that_another_claim_holds_stop_nobody(
    store: TaskStore, engine: Engine, clock: Clock
) -> None:
    """A claimer that froze in its transaction holds the only task of the key that is due."""
    (held,) = add(store, clock, "due")
    add(store, clock, "other", 2)
    with engine.begin() as frozen:
        frozen.execute(select(tasks.c.id).where(tasks.c.id == held).with_for_update())
        assert [claim(store, clock).key_id for _ in range(2)] == ["other", "other"]
        assert store.claim("w") == []
        frozen.execute(update(tasks).where(tasks.c.id == held).values(progress_step=1))
    assert claim(store, clock).id == held
