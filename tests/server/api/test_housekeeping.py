"""Sweeps: what is deleted when, and what stays."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine, select

from e2e.live import a_picture, wait_until
from redux_server.api import housekeeping
from redux_server.api.services import Services, assemble
from redux_server.database.clock import ClockGuard
from redux_server.database.migration import open_database
from redux_server.database.tables import idempotency
from redux_server.dispatch.presence import Presence, WorkerState
from redux_server.parameters import MODELS, PredictionRequest
from redux_server.pictures.uploads import PREFIX as UPLOADS
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import NewTask, Task
from server.in_process import Api, Clock, complete


def at(database: Engine, age_hours: float) -> TaskStore:
    """The store as it was some hours ago."""
    return TaskStore(database, clock=lambda: time.time() - age_hours * 3600)


def ended_task(services: Services, database: Engine, *, age_hours: float) -> Task:
    store = at(database, age_hours)
    parameters = {**PredictionRequest(image="x").parameters(), "image": "blob:x"}
    store.accept([NewTask("key", MODELS[0], parameters)], max_open=1000)
    task = complete(store, lambda task: [f"{task.id}/1/0.png"])
    for key in (f"{task.id}/input", f"{task.id}/1/0.png"):
        services.blobs.put(key, a_picture())
    return task


def test_sweep_deletes_old_tasks_with_all_their_files(
    build_services: Callable[..., Services], database: Engine
) -> None:
    services = build_services(retention_hours=24.0)
    old = ended_task(services, database, age_hours=24.1)
    young = ended_task(services, database, age_hours=23.9)
    assert housekeeping.sweep(services) == 1
    assert [task and task.id for task in services.store.get([old.id, young.id])] == [None, young.id]
    for key in (f"{old.id}/input", f"{old.id}/1/0.png"):
        with pytest.raises(FileNotFoundError):
            services.blobs.get(key)
    assert services.blobs.get(f"{young.id}/1/0.png")
    assert housekeeping.sweep(services) == 0


def test_sweep_keeps_tasks_that_have_not_ended(
    build_services: Callable[..., Services], database: Engine
) -> None:
    services = build_services(retention_hours=1.0)
    parameters = PredictionRequest(image="x").parameters()
    new = [NewTask("key", MODELS[0], parameters) for _ in range(2)]
    at(database, 100).accept(new, max_open=10)
    at(database, 99).claim("host/cpu")
    assert housekeeping.sweep(services) == 0
    assert None not in services.store.get([task.id for task in new])


def test_sweep_deletes_more_than_one_batch(
    build_services: Callable[..., Services], database: Engine
) -> None:
    services = build_services(retention_hours=1.0)
    store = at(database, 50)
    parameters = PredictionRequest(image="x").parameters()
    store.accept([NewTask("key", MODELS[0], parameters) for _ in range(120)], max_open=1000)
    for _ in range(120):
        complete(store)
    assert housekeeping.sweep(services) == 120


def test_sweep_deletes_pictures_whose_task_was_never_accepted(
    build_services: Callable[..., Services],
    database: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    services = build_services()
    kept = ended_task(services, database, age_hours=0)
    stray = f"{'5' * 32}/input"
    for key in (stray, "sample/photo.jpg"):
        services.blobs.put(key, a_picture())
    assert housekeeping.sweep_strays(services) == 0  # its task may be on its way
    monkeypatch.setattr(housekeeping, "STRAY_AFTER_S", -1.0)
    assert housekeeping.sweep_strays(services) == 1
    with pytest.raises(FileNotFoundError):
        services.blobs.get(stray)
    assert services.blobs.get("sample/photo.jpg")
    assert services.blobs.get(f"{kept.id}/input")


def test_keys_are_kept_for_a_day(build_services: Callable[..., Services], database: Engine) -> None:
    services = build_services()
    hour = 3600.0
    for name, age_h in (("old", 24.1), ("young", 23.9)):
        store = TaskStore(database, clock=lambda age_h=age_h: time.time() - age_h * hour)
        store.accept([NewTask("k", "m", {}, idempotency_key=name)], max_open=9)
    assert housekeeping.sweep_idempotency_keys(services) == 1
    with database.connect() as db:
        assert list(db.scalars(select(idempotency.c.key))) == ["young"]


def test_server_sweeps_when_it_starts(
    build_services: Callable[..., Services], build_api: Callable[..., Api], database: Engine
) -> None:
    services = build_services(retention_hours=1.0)
    old = ended_task(services, database, age_hours=2)
    api = build_api(services)
    wait_until(lambda: api.get("/livez") and services.store.get([old.id]) == [None], 10)


# --- A wrong date, another's pictures -------------------------------------------------------------

DAY = 24 * 3600.0


def test_nothing_is_deleted_while_the_date_is_not_believed(
    build_services: Callable[..., Services], database: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(time.time())
    services = build_services(retention_hours=1.0, upload_retention_hours=1.0)
    services = with_clock(services, database, clock)
    task = ended_task(services, database, age_hours=0)
    stray, upload = f"{'5' * 32}/input", f"{UPLOADS}{'6' * 32}/picture.png"
    new = NewTask("k", "m", {}, idempotency_key="key")
    TaskStore(database, clock=clock).accept([new], max_open=9)
    services.presence.announce("w", "cpu", WorkerState.READY)
    for key in (stray, upload):
        services.blobs.put(key, a_picture())
    housekeeping.sweep_all(services)
    clock.now += 8 * DAY
    housekeeping.sweep_all(services)
    for key in (f"{task.id}/1/0.png", f"{task.id}/input", stray, upload):
        assert services.blobs.get(key) == a_picture()
    assert services.store.get([task.id]) != [None]
    with database.connect() as db:
        assert list(db.scalars(select(idempotency.c.key))) == ["key"]
    assert len(services.presence.all()) == 1
    assert "the date has jumped" in capsys.readouterr().out
    read = housekeeping.own_gauges(services, is_database_up=True)
    values = {name: value for (name, _), value in read.items()}
    assert values["clock_jump_seconds"] == pytest.approx(8 * DAY, abs=60)
    clock.now -= 8 * DAY
    housekeeping.sweep_all(services)
    assert services.clock_guard.jump_s == 0
    assert services.store.get([task.id]) != [None]


def test_what_is_old_by_the_date_of_this_machine_alone_stays(
    build_services: Callable[..., Services], database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a node whose date is wrong, over a database whose date is right."""
    services = with_clock(build_services(), database, Clock(time.time()))
    task = ended_task(services, database, age_hours=0)
    stray, upload = f"{'5' * 32}/input", f"{UPLOADS}{'6' * 32}/picture.png"
    for key in (stray, upload):
        services.blobs.put(key, a_picture())
    ahead = time.time() + 60 * DAY
    monkeypatch.setattr(time, "time", lambda: ahead)
    housekeeping.sweep_all(services)
    monkeypatch.undo()
    for key in (f"{task.id}/1/0.png", stray, upload):
        assert services.blobs.get(key) == a_picture()
    assert services.store.get([task.id]) != [None]


def with_clock(services: Services, database: Engine, clock: Clock) -> Services:
    """The same, but ``clock`` is the database's."""
    guard = ClockGuard(database, clock=clock)
    presence = Presence(database, clock=clock)
    return replace(services, clock=clock, clock_guard=guard, presence=presence)


def test_pictures_of_another_database_are_left_alone_and_that_is_said(
    build_services: Callable[..., Services],
    database: Engine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = build_services(upload_retention_hours=1.0, retention_hours=1.0)
    theirs = ended_task(first, database, age_hours=0)
    upload = f"{UPLOADS}{'6' * 32}/picture.png"
    first.blobs.put(upload, a_picture())
    housekeeping.sweep_all(first)
    for path in first.settings.blobs_dir.rglob("*"):
        os.utime(path, (1, 1))
    other = open_database(f"sqlite:///{tmp_path / 'other.db'}")
    second = assemble(first.settings, other, first.blobs)
    ours = ended_task(second, other, age_hours=2)
    housekeeping.sweep_all(second)
    assert first.blobs.get(f"{theirs.id}/1/0.png") == a_picture()
    assert first.blobs.get(upload) == a_picture()
    assert "belong to another database" in capsys.readouterr().out
    read = housekeeping.own_gauges(second, is_database_up=True)
    assert {name: value for (name, _), value in read.items()}["pictures_foreign"] == 1
    with pytest.raises(FileNotFoundError):  # its own tasks it knows
        second.blobs.get(f"{ours.id}/1/0.png")
    other.dispose()


def test_what_a_killed_process_left_of_a_picture_is_swept_with_its_folder(
    build_services: Callable[..., Services],
) -> None:
    services = build_services()
    half = services.settings.blobs_dir / ("5" * 32) / "1" / "0.png#1"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    os.utime(half, (time.time() - 7200,) * 2)
    services.store_owner.look(list)
    assert housekeeping.sweep_strays(services) == 1
    assert not half.parent.parent.exists()
