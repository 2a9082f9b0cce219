"""Previews beside the work: whose are made, how often, and that they cost no task anything."""

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from e2e.live import wait_until
from redux_pipelines.contract.types import Preview, Progress
from redux_pipelines.fake import FakePipeline
from redux_server.tasks.previews import Previews, StoredPreview
from redux_server.tasks.task import Status, Task
from redux_server.worker import previews as module
from redux_server.worker.previews import PreviewSender
from server.worker_bench import Bench


class Noted(Previews):
    """Previews that are noted as they are stored; or the database is away for them."""

    def __init__(self, database: Engine, *, is_away: bool = False) -> None:
        super().__init__(database)
        self.is_away = is_away
        self.stored: list[StoredPreview] = []
        self.forgotten: set[str] = set()

    def put(self, task_id: str, preview: StoredPreview) -> None:
        if self.is_away:
            raise OperationalError("INSERT", {}, Exception("database is locked"))
        super().put(task_id, preview)
        self.stored.append(preview)

    def forget(self, ids: Any) -> None:
        super().forget(ids)
        self.forgotten |= set(ids)


@pytest.fixture
def task(bench: Bench) -> Callable[..., Task]:
    """A task that is being worked on."""

    def make(**more: Any) -> Task:
        bench.submit(**more)
        (claimed,) = bench.store.claim("host/cpu")
        return claimed

    return make


def step(number: int, made: list[int]) -> Progress:
    def look() -> Preview:
        made.append(number)
        return Preview(Image.new("RGB", (16, 8), "teal"), 0)

    return Progress(number, 100, look)


def test_a_task_that_asks_for_previews_gets_them_until_it_ends(
    database: Engine, task: Callable[..., Task]
) -> None:
    noted = Noted(database)
    sender = PreviewSender(noted, every_s=0.0)
    wanted = task(enable_preview=True)
    sender.begin(wanted)
    sender.offer(wanted, step(3, []))
    assert wait_until(lambda: bool(noted.stored), 10)
    stored = noted.get(wanted.id)
    assert stored is not None and (stored.attempt, stored.step, stored.index) == (1, 3, 0)
    image = Image.open(io.BytesIO(stored.jpeg))
    assert (image.format, image.size) == ("JPEG", (16, 8))
    sender.end(wanted)
    assert wait_until(lambda: wanted.id in noted.forgotten, 10)
    assert noted.get(wanted.id) is None


def test_nothing_is_made_for_nobody_and_something_once_somebody_follows(
    database: Engine, task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.02)
    noted = Noted(database)
    sender = PreviewSender(noted, every_s=0.0)
    unwanted, made = task(), list[int]()
    sender.begin(unwanted)
    sender.offer(unwanted, step(1, made))
    assert made == []
    noted.want(unwanted.id)

    def is_made() -> bool:
        sender.offer(unwanted, step(2, made))
        return bool(made)

    assert wait_until(is_made, 10)
    assert wait_until(lambda: bool(noted.stored), 10)


def test_no_more_than_a_few_a_second_are_made(database: Engine, task: Callable[..., Task]) -> None:
    sender = PreviewSender(Noted(database), every_s=3600)
    wanted, made = task(enable_preview=True), list[int]()
    sender.begin(wanted)
    for number in range(1, 50):
        sender.offer(wanted, step(number, made))
    assert made == [1]
    assert module.EVERY_S == 1 / 5


def test_a_database_that_is_away_costs_previews_only(bench: Bench, database: Engine) -> None:
    previews = PreviewSender(Noted(database, is_away=True), every_s=0.0)
    pipeline = FakePipeline(step_s=0.01)
    task_id = bench.submit(enable_preview=True)
    bench.worker(pipeline=pipeline, previews=previews).step()
    (ended,) = bench.store.get([task_id])
    assert ended is not None and ended.status is Status.COMPLETED


def test_a_preview_that_cannot_be_made_costs_no_task(bench: Bench, database: Engine) -> None:
    class Blind(FakePipeline):
        asked = 0

        def generate_batch(self, requests: Any) -> Any:
            for index, event in super().generate_batch(requests):
                is_step = isinstance(event, Progress)
                yield index, replace(event, preview=self.fail) if is_step else event

        def fail(self) -> Preview:
            self.asked += 1
            raise RuntimeError("CUDA out of memory")

    pipeline, noted = Blind(), Noted(database)
    task_id = bench.submit(enable_preview=True)
    bench.worker(pipeline=pipeline, previews=PreviewSender(noted, every_s=0.0)).step()
    (ended,) = bench.store.get([task_id])
    assert ended is not None and ended.status is Status.COMPLETED
    assert (pipeline.asked, noted.stored) == (1, [])


def test_a_worker_stores_what_its_pipeline_shows(bench: Bench, database: Engine) -> None:
    noted = Noted(database)
    task_id = bench.submit(enable_preview=True, num_inference_steps=5, num_images=2)
    previews = PreviewSender(noted, every_s=0.0)
    bench.worker(pipeline=FakePipeline(step_s=0.05), previews=previews).step()
    assert wait_until(lambda: task_id in noted.forgotten, 10)
    assert {each.index for each in noted.stored} == {0, 1}
    assert [each.step for each in noted.stored] == sorted({each.step for each in noted.stored})
    assert noted.get(task_id) is None


def test_where_every_image_is_checked_no_preview_is_made(database: Engine) -> None:
    from redux_server.settings import ServerSettings
    from redux_server.worker.main import _sender

    settings = replace(ServerSettings(), force_safety_checker=True)
    assert _sender(settings, Previews(database)) is None
    assert _sender(ServerSettings(), Previews(database)) is not None
