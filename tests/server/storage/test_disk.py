"""A disk that fills up: no task is accepted that could not be ended; a ballast is released."""

import errno
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from e2e.live import a_picture, data_uri
from redux_server.api import housekeeping
from redux_server.api.services import Services
from redux_server.storage.blobs import MARKER, StorageError
from redux_server.storage.disk import Ballast, DiskSpace, is_full
from redux_server.tasks.task import Outcome, Status
from server.full_disk import MIB, fill
from server.in_process import Api
from server.worker_bench import ME

SUBMIT = "/api/v3/wavespeed-ai/flux-pro-redux"


# --- the floor ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free_mib", "is_refused"), [(600, False), (512, False), (511, True), (0, True)]
)
def test_below_the_floor_a_submit_is_refused_before_anything_is_written(
    build_services: Callable[..., Services],
    build_api: Callable[..., Api],
    free_mib: int,
    is_refused: bool,
) -> None:
    services = build_services()
    disk = DiskSpace([Path("/x")], floor_bytes=512 * MIB, free=lambda _: free_mib * MIB)
    api = build_api(replace(services, disk=disk))
    answer = api.post(SUBMIT, json={"image": data_uri(a_picture())})
    written = services.blobs.tasks_before(time.time() + 60) - {MARKER.partition("/")[0]}
    if is_refused:
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert f"{free_mib} MiB free" in answer.json()["message"]
        assert services.store.queue_state().waiting == 0
        assert written == set()
    else:
        assert answer.status_code == 200
        assert written == {answer.json()["data"]["id"]}


def test_below_the_floor_what_was_accepted_goes_on(
    build_services: Callable[..., Services], build_api: Callable[..., Api]
) -> None:
    services, free = build_services(), [600 * MIB]
    disk = DiskSpace([Path("/x")], floor_bytes=512 * MIB, free=lambda _: free[0])
    api = build_api(replace(services, disk=disk))
    task_id = api.post(SUBMIT, json={"image": data_uri(a_picture())}).json()["data"]["id"]
    free[0] = 5 * MIB
    assert api.post(SUBMIT, json={"image": data_uri(a_picture())}).status_code == 503
    readyz = api.get("/readyz").json()
    assert "5 MiB free" in readyz["refuses_tasks"]
    gauges = housekeeping.own_gauges(api.services, is_database_up=True)
    read = {name: value for (name, _), value in gauges.items()}
    assert read["disk_free_bytes"] == 5 * MIB
    services.blobs.put(f"{task_id}/1/0.png", a_picture())
    assert services.store.claim(ME) != []
    done = Outcome(Status.COMPLETED, outputs=[f"{task_id}/1/0.png"], has_nsfw_contents=[False])
    assert services.store.finish(task_id, 1, done)
    data = api.get(f"/api/v3/predictions/{task_id}/result").json()["data"]
    assert data["status"] == "completed"
    assert api.get(data["outputs"][0], key="").content == a_picture()
    free[0] = 600 * MIB
    assert api.post(SUBMIT, json={"image": data_uri(a_picture())}).status_code == 200
    assert "refuses_tasks" not in api.get("/readyz").json()


def test_the_fullest_of_several_disks_counts() -> None:
    free = {Path("/data"): 900 * MIB, Path("/pictures"): 100 * MIB}
    disk = DiskSpace(free, floor_bytes=512 * MIB, free=free.__getitem__)
    assert disk.free_bytes() == 100 * MIB
    assert disk.complaint() is not None


def test_floor_of_zero_is_none() -> None:
    assert DiskSpace([Path("/x")], floor_bytes=0, free=lambda _: 0).complaint() is None


# --- the ballast ----------------------------------------------------------------------------------


def test_ballast_really_holds_its_size(tmp_path: Path) -> None:
    ballast = Ballast(tmp_path / "ballast", 4 * MIB)
    assert ballast.hold()
    stat = (tmp_path / "ballast").stat()
    assert stat.st_size == 4 * MIB
    assert stat.st_blocks * 512 >= 4 * MIB, "a sparse file holds nothing"
    assert not ballast.hold(), "made twice"
    assert ballast.release()
    assert not ballast.release()
    assert list(tmp_path.iterdir()) == []


def test_ballast_of_size_zero_is_never_made(tmp_path: Path) -> None:
    assert not Ballast(tmp_path / "ballast", 0).hold()
    assert list(tmp_path.iterdir()) == []


def test_ballast_is_made_only_where_as_much_again_stays_free(small_disk: Path) -> None:
    ballast = Ballast(small_disk / "ballast", 4 * MIB)
    others = fill(small_disk, leave_bytes=7 * MIB)
    assert not ballast.hold()
    assert list(small_disk.iterdir()) == [others]
    others.unlink()
    assert ballast.hold()


def test_api_keeps_a_ballast_on_board(
    build_services: Callable[..., Services], build_api: Callable[..., Api]
) -> None:
    services = build_services(min_free_disk=1)
    api = build_api(services)
    path = services.settings.ballast_path
    ends_at = time.monotonic() + 20
    while not path.exists() and time.monotonic() < ends_at:
        api.get("/livez")
    assert path.stat().st_blocks * 512 >= 16 * MIB


def test_only_a_full_disk_costs_the_ballast(tmp_path: Path) -> None:
    ballast = Ballast(tmp_path / "ballast", MIB)
    ballast.hold()

    def locked() -> bool:
        raise OperationalError("UPDATE", {}, Exception("database is locked"))

    with pytest.raises(OperationalError):
        ballast.make_room_for(locked)
    assert (tmp_path / "ballast").exists()


def test_a_change_that_stays_impossible_is_tried_twice_and_raised(tmp_path: Path) -> None:
    ballast, tries = Ballast(tmp_path / "ballast", MIB), []
    ballast.hold()

    def full() -> bool:
        tries.append((tmp_path / "ballast").exists())
        raise OperationalError("UPDATE", {}, Exception("database or disk is full"))

    with pytest.raises(OperationalError):
        ballast.make_room_for(full)
    assert tries == [True, False]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (StorageError("the endpoint does not answer"), False),
        (OperationalError("x", {}, Exception("database or disk is full")), True),
        (OperationalError("x", {}, Exception("database is locked")), False),
    ],
)
def test_a_full_disk_is_told_from_other_troubles(error: Exception, expected: bool) -> None:
    assert is_full(error) is expected
