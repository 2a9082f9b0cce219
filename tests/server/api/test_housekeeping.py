"""Sweeps: what is deleted when, and what stays."""

import time
from collections.abc import Callable

import pytest
from sqlalchemy import Engine, select

from e2e.live import a_picture, wait_until
from redux_server.api import housekeeping
from redux_server.api.services import Services
from redux_server.database.tables import idempotency
from redux_server.parameters import MODELS, PredictionRequest
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import NewTask, Task
from server.in_process import Api, complete


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
