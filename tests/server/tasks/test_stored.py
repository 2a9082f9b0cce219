"""What tasks store is counted per API key, whoever ends or deletes them, and bounded."""

import base64
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import Engine, func, select, update

from redux_server.api.housekeeping import sweep
from redux_server.api.limits import StorageShare
from redux_server.database.tables import stored as ledger
from redux_server.database.tables import tasks
from redux_server.settings import ServerSettings
from redux_server.storage.disk import DiskSpace
from redux_server.tasks.store import TaskStore
from redux_server.tasks.stored import FILE_BYTES, TASK_BYTES, most_output_bytes
from redux_server.tasks.task import Created, NewTask, Outcome, Status
from server.in_process import SUBMIT, Api, Clock, complete

MIB = 2**20
DONE = Outcome(status=Status.COMPLETED, outputs=["0.png"])


def noise(size_bytes: int) -> str:
    """A picture that comes inline and takes so many bytes, at least."""
    side = int((size_bytes / 3) ** 0.5) + 1
    pixels = random.Random(0).randbytes(3 * side * side)
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), pixels).save(file, "BMP")
    return "data:image/bmp;base64," + base64.b64encode(file.getvalue()).decode()


def body(picture: str, **more: Any) -> dict[str, Any]:
    return {"image": picture, "size": "512*512", "num_inference_steps": 1, **more}


def files_bytes(folder: Path) -> int:
    """What lies on the disk for tasks."""
    found = (folder / "data" / "blobs").rglob("*")
    return sum(
        path.stat().st_size for path in found if path.name != "database-id" and path.is_file()
    )


def check_refused(answer: Any) -> None:
    assert answer.status_code == 429, answer.text
    found = answer.json()
    assert found["error_code"] == "storage_full"
    assert "bytes more" in found["message"] and "predictions/delete" in found["message"]
    assert int(answer.headers["retry-after"]) > 0


def test_inline_pictures_of_a_key_are_bounded_and_deleting_makes_room(
    build_api: Callable[..., Api], tmp_path: Path
) -> None:
    api = build_api(max_stored_tasks=2)
    picture = noise(MIB * 3 // 4)
    first = api.post(SUBMIT, json=body(picture)).json()["data"]["id"]
    check_refused(api.post(SUBMIT, json=body(picture, images=[picture])))
    assert files_bytes(tmp_path) < MIB  # nothing is left of what was refused
    stranger = api.services.keys.create("stranger")
    assert api.post(SUBMIT, json=body(picture), key=stranger).status_code == 200
    assert api.request("DELETE", f"/api/v3/predictions/{first}").status_code == 200
    assert api.post(SUBMIT, json=body(picture)).status_code == 200


def test_what_is_counted_is_what_lies_on_the_disk_and_a_little_more(
    build_api: Callable[..., Api], tmp_path: Path
) -> None:
    api = build_api()
    picture = noise(50_000)
    count = 3
    for number in range(count):
        api.post(SUBMIT, json=body(picture, images=[noise(40_000)], prompt="p" * number))
    for _ in range(count):
        [task] = api.services.store.claim("w")
        api.services.blobs.put(f"{task.id}/1/0.png", bytes(70_000))
        kept = 70_000 + FILE_BYTES
        assert api.services.store.finish(task.id, task.attempt, DONE, kept_bytes=kept)
    [counted] = api.services.store.stored_bytes().values()
    overhead = counted - files_bytes(tmp_path)
    assert 0 < overhead - count * (3 * FILE_BYTES + TASK_BYTES) < count * 2000  # parameters


def test_a_task_is_refused_before_its_pictures_are_stored(
    build_api: Callable[..., Api], stored: list[str]
) -> None:
    api = build_api(max_stored_tasks=2)
    check_refused(api.post(SUBMIT, json=body(noise(MIB * 5 // 2))))
    assert not stored


def test_a_full_key_may_still_repeat_a_request(build_api: Callable[..., Api]) -> None:
    api = build_api(max_stored_tasks=2)
    once = {"headers": {"Idempotency-Key": "k"}, "json": body(noise(MIB * 2 // 3))}
    first = api.post(SUBMIT, **once).json()["data"]["id"]
    assert api.post(SUBMIT, **once).json()["data"]["id"] == first
    check_refused(api.post(SUBMIT, json=body(noise(MIB * 2 // 3))))


def test_the_sweep_makes_room(build_api: Callable[..., Api], database: Engine) -> None:
    api = build_api(max_stored_tasks=2, retention_hours=1.0)
    picture = noise(MIB * 2 // 3)
    api.post(SUBMIT, json=body(picture))
    complete(api.services.store)
    check_refused(api.post(SUBMIT, json=body(picture)))
    with database.begin() as db:
        db.execute(update(tasks).values(finished_at=tasks.c.finished_at - 3601))
    assert sweep(api.services) == 1
    assert api.post(SUBMIT, json=body(picture)).status_code == 200


def test_images_count_as_they_may_be_until_they_are_there(
    either_database: Engine, clock: Clock
) -> None:
    store = TaskStore(either_database, clock=clock)
    most = most_output_bytes(1024, 1024, 4)
    new = NewTask("k", "m", {}, output_bytes=most)
    answers = store.accept([new, NewTask("k", "m", {}, output_bytes=most)], max_open=9,
                           left_bytes=lambda stored: most + MIB - stored)  # fmt: skip
    assert [isinstance(each, Created) for each in answers] == [True, False]
    assert most < store.stored_bytes()["k"] < most + MIB
    [task] = store.claim("w")
    store.finish(task.id, 1, DONE, kept_bytes=5)
    assert store.stored_bytes()["k"] == TASK_BYTES + len("{}") + 5
    store.delete([task.id])
    assert store.stored_bytes()["k"] == 0


def test_a_task_whose_workers_died_counts_for_each_of_them(
    either_database: Engine, clock: Clock
) -> None:
    store = TaskStore(either_database, clock=clock, max_attempts=3)
    store.accept([NewTask("k", "m", {}, output_bytes=1000)], max_open=9)
    for _ in range(3):
        store.claim("w")
        store.release("w")
    assert store.stored_bytes()["k"] == TASK_BYTES + len("{}") + 3000


def test_the_ledger_stays_short(either_database: Engine, clock: Clock) -> None:
    store = TaskStore(either_database, clock=clock)
    for _ in range(300):
        store.accept([NewTask("k", "m", {}, output_bytes=1)], max_open=1000)
    with either_database.connect() as db:
        rows = db.scalar(select(func.count()).select_from(ledger))
    assert rows is not None and rows < 300
    assert store.stored_bytes()["k"] == 300 * (TASK_BYTES + len("{}") + 1)


@pytest.mark.parametrize(("share", "part"), [(80, 0.8), (50, 0.5), (20, 0.2)])
def test_a_key_that_is_alone_fills_its_share_of_the_disk(
    share: int, part: float, tmp_path: Path
) -> None:
    size, mine = 1000 * MIB, 0
    disk = DiskSpace([tmp_path], floor_bytes=100 * MIB, free=lambda _: size - mine)
    bound = StorageShare(ServerSettings(data_dir=tmp_path, disk_share=share), disk)
    while (left := bound.left(mine)) >= MIB:
        mine += min(left, 50 * MIB)
    assert mine / (900 * MIB) == pytest.approx(part, abs=0.01)


def test_keys_leave_room_for_the_next(tmp_path: Path) -> None:
    size = 1000 * MIB
    filled: list[int] = []
    disk = DiskSpace([tmp_path], floor_bytes=0, free=lambda _: size - sum(filled))
    bound = StorageShare(ServerSettings(data_dir=tmp_path), disk)
    for number in range(4):
        filled.append(0)
        while (left := bound.left(filled[number])) >= MIB:
            filled[number] += left
        assert filled[number] > 0 and disk.room_bytes() > 0


def test_no_share_of_a_bucket_and_none_of_100_percent(tmp_path: Path) -> None:
    disk = DiskSpace([tmp_path], floor_bytes=0, free=lambda _: 0)
    bucket = ServerSettings(data_dir=tmp_path, blob_url="s3://pictures/x")
    for settings in (bucket, ServerSettings(data_dir=tmp_path, disk_share=100)):
        assert StorageShare(settings, disk).left(2**50) > 2**50
