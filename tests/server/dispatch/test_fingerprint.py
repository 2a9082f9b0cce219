"""Which tasks a worker may take, by what it runs: on SQLite and on PostgreSQL."""

from collections.abc import Callable

import pytest
from sqlalchemy import Engine

from redux_server.dispatch.celery import Reconciler, Turns
from redux_server.dispatch.fingerprint import EVERY_S, Served, described, fingerprint_of, served
from redux_server.dispatch.presence import Presence, WorkerState
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import NewTask
from server.in_process import Clock

OLD, NEW, OTHER = "aaa/1.0.0", "aaa/1.1.0", "bbb/1.1.0"


def test_a_fingerprint_says_weights_and_version() -> None:
    assert fingerprint_of("aaa", "1.0.0") == OLD
    assert described(OLD) == "the weights aaa and version 1.0.0"


@pytest.mark.parametrize(
    ("own", "alive", "bound", "taken"),
    [
        ([NEW], [NEW], [NEW], {"", NEW}),
        ([NEW], [NEW, OLD], [NEW, OLD], {"", NEW}),  # an old worker is there to do it
        ([NEW], [NEW], [OLD], {"", NEW, OLD}),  # none is left
        ([NEW], [NEW], [OTHER], {"", NEW}),  # other weights: never
        ([NEW, OTHER], [NEW, OTHER], [OLD, OTHER], {"", NEW, OTHER, OLD}),
        ([""], [""], [NEW], {""}),
    ],
)
def test_other_weights_are_never_taken_and_another_version_once_it_is_gone(
    own: list[str], alive: list[str], bound: list[str], taken: set[str]
) -> None:
    assert served(own, alive, bound) == taken


@pytest.fixture
def store(either_database: Engine, clock: Clock) -> TaskStore:
    return TaskStore(either_database, clock=clock)


@pytest.fixture
def presence(either_database: Engine, clock: Clock) -> Presence:
    return Presence(either_database, clock=clock)


@pytest.fixture
def accept(store: TaskStore, clock: Clock) -> Callable[..., str]:
    def add(fingerprint: str, shape: str = "", key: str = "k") -> str:
        clock.now += 1
        new = NewTask(key, "m", {}, shape=shape, fingerprint=fingerprint)
        store.accept([new], max_open=100)
        return new.id

    return add


def ids(tasks: list) -> list[str]:
    return [task.id for task in tasks]


def test_a_worker_gets_what_was_accepted_for_it_and_what_anyone_may_do(
    store: TaskStore, accept: Callable[..., str]
) -> None:
    other, mine, anyone = accept(OTHER), accept(NEW), accept("")
    mine_only = {"", NEW}
    assert ids(store.claim("w", accepted_for=mine_only)) == [mine]
    assert ids(store.claim("w", accepted_for=mine_only)) == [anyone]
    assert store.claim("w", accepted_for=mine_only) == []
    assert store.bound() == {OTHER: 1}
    assert ids(store.claim("w")) == [other], "a worker without a fingerprint takes all"


def test_company_in_a_batch_was_accepted_for_the_same(
    store: TaskStore, accept: Callable[..., str]
) -> None:
    first, _, last = (accept(each, shape="s") for each in (NEW, OTHER, NEW))
    assert ids(store.claim("w", 3, accepted_for={"", NEW})) == [first, last]
    assert store.claim("w", like="s", accepted_for={"", NEW}) == []


def test_a_key_with_tasks_for_others_only_keeps_nobody_waiting(
    store: TaskStore, accept: Callable[..., str]
) -> None:
    for _ in range(5):
        accept(OTHER, key="a")  # the first in every order
    mine = accept(NEW, key="b")
    assert ids(store.claim("w", accepted_for={"", NEW})) == [mine]


def test_a_task_that_was_given_back_is_still_for_its_own(
    store: TaskStore, accept: Callable[..., str]
) -> None:
    task_id = accept(NEW)
    store.claim("w", accepted_for={"", NEW})
    store.release("w")
    assert store.claim("x", accepted_for={"", OTHER}) == []
    assert ids(store.claim("y", accepted_for={"", NEW})) == [task_id]


def test_after_an_upgrade_the_new_version_goes_on_once_no_old_worker_is_left(
    store: TaskStore, presence: Presence, clock: Clock, accept: Callable[..., str]
) -> None:
    steady = Clock(0.0)
    takes = Served(NEW, store, presence, clock=steady)
    accept(OLD)
    accept(OTHER)
    presence.announce("old", "cuda:0", WorkerState.READY, fingerprint=OLD)
    assert takes() == {"", NEW}
    presence.leave("old")
    assert takes() == {"", NEW}, "it does not ask at each claim"
    steady.now += EVERY_S
    assert takes() == {"", NEW, OLD}
    presence.announce("old", "cuda:0", WorkerState.READY, fingerprint=OLD)
    steady.now += EVERY_S
    assert takes() == {"", NEW}
    clock.now += 31  # switched off without a word
    steady.now += EVERY_S
    assert takes() == {"", NEW, OLD}


def test_tasks_can_be_let_go_to_anyone(store: TaskStore, accept: Callable[..., str]) -> None:
    accept(OTHER)
    accept(NEW)
    assert store.unbind({OTHER: 1}) == 1
    assert store.bound() == {"": 1, NEW: 1}


def test_no_ticket_is_sent_for_what_no_worker_may_take(
    either_database: Engine,
    store: TaskStore,
    presence: Presence,
    clock: Clock,
    accept: Callable[..., str],
) -> None:
    asked: list[int] = []
    reconciler = Reconciler(store, presence, Turns(either_database, clock=clock), asked.append)
    presence.announce("w", "cuda:0", WorkerState.READY, fingerprint=NEW)
    accept(OTHER)
    clock.now += 10
    presence.heartbeat("w")
    assert reconciler.tick() == 0 and asked == []
    accept(NEW)
    clock.now += 10
    presence.heartbeat("w")
    assert reconciler.tick() == 1 and asked == [1]
