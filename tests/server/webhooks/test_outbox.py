"""The outbox, on SQLite and, where there is one, on PostgreSQL."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event, insert, select

from redux_server.database.migration import open_database
from redux_server.database.tables import webhooks
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import NewTask, Outcome, Status
from redux_server.webhooks.callback import Callback
from redux_server.webhooks.outbox import MAX_TRIES, Delivery, Outbox, retry_pause_s
from server.in_process import Clock, end_next

HOLD_S = 60.0
HOOK = Callback("https://example.com/hook", "https://flux.example/")


@pytest.fixture
def engine(either_database: Engine) -> Engine:
    return either_database


@pytest.fixture
def outbox(engine: Engine, clock: Clock) -> Outbox:
    return Outbox(engine, hold_s=HOLD_S, clock=clock)


def add(engine: Engine, clock: Clock, *ids: str, hook: Callback = HOOK, key: str = "k") -> None:
    rows = [
        {
            "task_id": task_id,
            "key_id": key,
            "url": hook.stored(),
            "created_at": clock(),
            "next_at": clock() + number / 1000,
        }
        for number, task_id in enumerate(ids)
    ]
    with engine.begin() as db:
        db.execute(insert(webhooks), rows)
    clock.now += 1


def row(engine: Engine, task_id: str) -> Any:
    with engine.connect() as db:
        return db.execute(select(webhooks).where(webhooks.c.task_id == task_id)).one_or_none()


def ids(deliveries: Any) -> list[str]:
    return [delivery.task_id for delivery in deliveries]


# --- the schedule ---------------------------------------------------------------------------------


@pytest.mark.parametrize("luck", [0.0, 0.5, 1.0])
def test_tries_are_many_and_span_more_than_a_day(luck: float) -> None:
    pauses: list[float] = []
    while (pause_s := retry_pause_s(len(pauses) + 1, lambda: luck)) is not None:
        pauses.append(pause_s)
    assert len(pauses) + 1 == MAX_TRIES >= 8
    assert 24 * 3600 <= sum(pauses) <= 36 * 3600
    assert pauses == sorted(pauses)
    assert 5 <= pauses[0] <= 60  # a receiver that restarts is soon asked again
    assert max(pauses) <= 8 * 3600


def test_pauses_differ_by_chance() -> None:
    assert len({retry_pause_s(3) for _ in range(20)}) > 10


# --- claiming -------------------------------------------------------------------------------------


def test_due_comes_in_order_and_not_before_its_time(
    engine: Engine, outbox: Outbox, clock: Clock
) -> None:
    add(engine, clock, "a", "b", "c")
    (first,) = outbox.due(1)
    assert (first.task_id, first.key_id, first.callback, first.tries) == ("a", "k", HOOK, 0)
    assert ids(outbox.due(9)) == ["a", "b", "c"]
    clock.now -= 100
    assert outbox.due(9) == []


def test_two_nodes_never_make_the_same_try(engine: Engine, outbox: Outbox, clock: Clock) -> None:
    add(engine, clock, "a", "b", "c")
    other = Outbox(engine, hold_s=HOLD_S, clock=clock)
    seen_here, seen_there = outbox.due(9), other.due(9)
    assert ids(other.claim(seen_there[:1])) == ["a"]
    claimed = outbox.claim(seen_here)
    assert ids(claimed) == ["b", "c"]
    assert [one.tries for one in claimed] == [1, 1]
    assert outbox.due(9) == [] == other.due(9)


def test_try_that_was_cut_short_is_made_again(engine: Engine, outbox: Outbox, clock: Clock) -> None:
    add(engine, clock, "a")
    outbox.claim(outbox.due(1))
    clock.now += HOLD_S - 1
    assert outbox.due(1) == []
    clock.now += 2
    (again,) = outbox.claim(outbox.due(1))
    assert (again.task_id, again.tries) == ("a", 2)


def tried_twice(engine: Engine, outbox: Outbox, clock: Clock) -> list[Delivery]:
    """Two tries of one delivery, the first of which was cut short."""
    add(engine, clock, "a")
    (old,) = outbox.claim(outbox.due(1))
    clock.now += HOLD_S + 1
    (new,) = outbox.claim(outbox.due(1))
    return [old, new]


def test_failure_of_an_older_try_changes_nothing(
    engine: Engine, outbox: Outbox, clock: Clock
) -> None:
    old, new = tried_twice(engine, outbox, clock)
    assert not outbox.retry(old, 1.0, "old")
    assert not outbox.give_up(old, "old")
    assert outbox.retry(new, 1.0, "new")
    assert row(engine, "a").error == "new"


def test_success_of_an_older_try_ends_the_delivery(
    engine: Engine, outbox: Outbox, clock: Clock
) -> None:
    old, new = tried_twice(engine, outbox, clock)
    assert outbox.delivered(old)
    assert not outbox.retry(new, 1.0, "late")
    assert not outbox.delivered(new)
    stored = row(engine, "a")
    assert (stored.next_at, stored.delivered_at, stored.error) == (None, clock(), "")


def test_failed_try_is_due_after_its_pause(engine: Engine, outbox: Outbox, clock: Clock) -> None:
    add(engine, clock, "a")
    (one,) = outbox.claim(outbox.due(1))
    assert outbox.retry(one, 40.0, "status 500")
    clock.now += 39
    assert outbox.due(1) == [] and outbox.count_open() == 1
    clock.now += 1
    assert [one.tries for one in outbox.due(1)] == [1]


def test_clock_that_was_set_back_delays_nothing(
    engine: Engine, outbox: Outbox, clock: Clock
) -> None:
    """Three wait since the clock was an hour ahead: for a first, a second and a cut-short try."""
    clock.now += 3600
    add(engine, clock, "first", "second", "cut short")
    outbox.retry(outbox.claim(outbox.due(10)[1:2])[0], 12.0, "500")
    outbox.claim([one for one in outbox.due(10) if one.task_id == "cut short"])
    clock.now -= 3600
    assert ids(outbox.due(10)) == []
    assert outbox.catch_up() == 3
    assert set(ids(outbox.due(10))) == {"first", "second", "cut short"}


def test_catching_up_leaves_every_pause_as_it_is(
    engine: Engine, outbox: Outbox, clock: Clock
) -> None:
    add(engine, clock, "a")
    for tries in range(1, MAX_TRIES):
        (delivery,) = outbox.claim(outbox.due(10))
        assert outbox.catch_up() == 0  # while it is tried
        pause_s = retry_pause_s(tries, lambda: 1.0)
        assert pause_s is not None and outbox.retry(delivery, pause_s, "500")
        assert outbox.catch_up() == 0
        clock.now += pause_s


def test_given_up_stays_with_its_reason(engine: Engine, outbox: Outbox, clock: Clock) -> None:
    add(engine, clock, "a")
    (one,) = outbox.claim(outbox.due(1))
    assert outbox.give_up(one, "status 500")
    clock.now += 1e6
    assert outbox.due(1) == [] and outbox.count_open() == 0
    stored = row(engine, "a")
    assert (stored.next_at, stored.delivered_at, stored.error) == (None, None, "status 500")


def test_dropped_is_forgotten(engine: Engine, outbox: Outbox, clock: Clock) -> None:
    add(engine, clock, "a", "b")
    one, _ = outbox.claim(outbox.due(2))
    outbox.drop(one)
    outbox.drop(one)
    assert row(engine, "a") is None and outbox.count_open() == 1


def test_busy_hosts_and_keys_are_passed_over(engine: Engine, outbox: Outbox, clock: Clock) -> None:
    for number in range(3):
        add(engine, clock, f"slow{number}", hook=Callback("https://slow_host/x", "b"))
    add(engine, clock, "port", hook=Callback("https://slow_host:8443/", "b"))
    add(engine, clock, "alike", hook=Callback("https://slowxhost/x", "b"))
    add(engine, clock, "key", key="busy")
    found = outbox.due(2, but_not_to=["https://slow_host"], but_not_of=["busy"])
    assert ids(found) == ["port", "alike"]


# --- with tasks -----------------------------------------------------------------------------------


def ended(engine: Engine, clock: Clock, *, outcome: Outcome, hook: Callback | None = HOOK) -> str:
    store = TaskStore(engine, clock=clock)
    new = NewTask("k", "m", {}, webhook_url=hook.stored() if hook else None)
    store.accept([new], max_open=10)
    task = end_next(store, outcome)
    assert task is not None
    return task.id


@pytest.mark.parametrize(
    "outcome", [Outcome(Status.COMPLETED), Outcome.failure(1402, "no picture")], ids=str
)
def test_end_of_a_task_is_in_the_outbox_at_once_and_once(
    engine: Engine, outbox: Outbox, clock: Clock, outcome: Outcome
) -> None:
    task_id = ended(engine, clock, outcome=outcome)
    (found,) = outbox.due(9)
    assert (found.task_id, found.key_id, found.callback, found.tries) == (task_id, "k", HOOK, 0)


def test_given_up_task_is_in_the_outbox(engine: Engine, outbox: Outbox, clock: Clock) -> None:
    store = TaskStore(engine, max_attempts=1, clock=clock)
    new = NewTask("k", "m", {}, webhook_url=HOOK.stored())
    store.accept([new], max_open=10)
    assert store.claim("w") and store.release("w") == 1
    assert ids(outbox.due(9)) == [new.id]


def test_task_without_a_webhook_leaves_the_outbox_empty(
    engine: Engine, outbox: Outbox, clock: Clock
) -> None:
    ended(engine, clock, outcome=Outcome(Status.COMPLETED), hook=None)
    clock.now += 10
    assert outbox.due(9) == [] and outbox.count_open() == 0


def test_task_is_kept_until_its_webhook_has_ended(
    engine: Engine, outbox: Outbox, clock: Clock
) -> None:
    task_id = ended(engine, clock, outcome=Outcome(Status.COMPLETED))
    store = TaskStore(engine, clock=clock)
    clock.now += 100
    assert store.ended_before(clock()) == []
    (one,) = outbox.claim(outbox.due(1))
    outbox.delivered(one)
    assert store.ended_before(clock()) == [task_id]
    store.delete([task_id])
    assert row(engine, task_id) is None


def test_deleted_task_is_not_told_of(engine: Engine, outbox: Outbox, clock: Clock) -> None:
    task_id = ended(engine, clock, outcome=Outcome(Status.COMPLETED))
    (claimed,) = outbox.claim(outbox.due(9))
    TaskStore(engine, clock=clock).delete([task_id])
    assert not outbox.retry(claimed, 1.0, "late") and not outbox.delivered(claimed)
    assert outbox.count_open() == 0


def test_due_reads_the_index(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path / 'plan.db'}")
    outbox = Outbox(engine, hold_s=1)
    statements: list[str] = []

    def note(_c: Any, _cur: Any, statement: str, parameters: Any, *_more: Any) -> None:
        if statement.startswith("SELECT"):
            statements.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    outbox.due(10, but_not_to=["https://a.example"])
    outbox.count_open()
    event.remove(engine, "before_cursor_execute", note)
    with engine.connect() as db:
        for statement in statements:
            plan = db.exec_driver_sql(
                f"EXPLAIN QUERY PLAN {statement}", ("x",) * statement.count("?")
            ).all()
            assert any("webhooks_next" in step[-1] for step in plan), plan
    assert len(statements) == 2
    engine.dispose()
