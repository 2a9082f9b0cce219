"""From the steps of a pipeline to stored previews, a few a second, beside the work itself.

The device's thread makes a preview where it is due; encoding and storing are for a thread of ours,
which keeps the newest of each task only. What goes wrong with a preview costs the preview.
"""

import io
import threading
import time
from dataclasses import dataclass

import structlog
from PIL import Image
from sqlalchemy.exc import SQLAlchemyError

from redux_pipelines.contract.types import Preview, Progress
from redux_server.tasks.previews import Previews, StoredPreview
from redux_server.tasks.task import Task

EVERY_S = 0.2
LOOK_EVERY_S = 0.5
JPEG_QUALITY = 80
_log = structlog.get_logger("redux_server.worker.previews")


@dataclass(slots=True)
class _Watched:
    """A task on the device."""

    task: Task
    is_wanted: bool
    due_at: float = 0.0
    step: int = 0
    last: Preview | None = None  # not stored yet


class PreviewSender:
    """Stores previews of the tasks on the device that are wanted: by the task, or by a follower.

    ``begin``, ``offer`` and ``end`` are for the device's thread.
    """

    def __init__(self, previews: Previews, *, every_s: float = EVERY_S) -> None:
        self._previews = previews
        self._every_s = every_s
        self._watched: dict[str, _Watched] = {}
        self._ended: set[str] = set()
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._looked_at = 0.0
        threading.Thread(target=self._run, name="previews", daemon=True).start()

    def begin(self, task: Task) -> None:
        """It is on the device."""
        is_wanted = bool(task.input.get("enable_preview"))
        with self._lock:
            self._watched[task.id] = _Watched(task, is_wanted)
            self._looked_at = 0.0
        self._news.set()

    def offer(self, task: Task, progress: Progress) -> None:
        """A step is done: make a preview if one is wanted and due."""
        watched = self._watched.get(task.id)
        now = time.monotonic()
        if watched is None or not watched.is_wanted or now < watched.due_at:
            return
        if progress.preview is None:
            return
        try:
            preview = progress.preview()
        except Exception as error:  # no room, say: the task itself may have enough
            watched.is_wanted, watched.due_at = False, float("inf")
            _log.warning("no previews of this task", task_id=task.id, exc_info=error)
            return
        watched.due_at = now + self._every_s
        watched.step, watched.last = progress.step, preview
        self._news.set()

    def end(self, task: Task) -> None:
        """It is off the device; its images come, or nothing."""
        with self._lock:
            if self._watched.pop(task.id, None) is not None:
                self._ended.add(task.id)
        self._news.set()

    def _run(self) -> None:
        while True:
            self._news.wait(LOOK_EVERY_S if self._watched else None)
            self._news.clear()
            try:
                self._store()
            except SQLAlchemyError as error:  # busy, away or full: the next one may go through
                _log.debug("previews were not stored", reason=type(error).__name__)
            except Exception as error:
                _log.warning("previews were not stored", exc_info=error)

    def _store(self) -> None:
        with self._lock:
            watched = list(self._watched.values())
            ended, self._ended = self._ended, set()
        self._look_who_wants(watched)
        for each in watched:
            preview, each.last = each.last, None
            if preview is not None:
                self._put(each, preview)
        with self._lock:  # those that ended while theirs were being stored
            ended |= self._ended
            self._ended.clear()
        if ended:
            self._previews.forget(ended)

    def _look_who_wants(self, watched: list[_Watched]) -> None:
        unwanted = [each for each in watched if not each.is_wanted]
        now = time.monotonic()
        if not unwanted or now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        wanted = self._previews.wanted([each.task.id for each in unwanted])
        for each in unwanted:
            each.is_wanted = each.task.id in wanted

    def _put(self, watched: _Watched, preview: Preview) -> None:
        task = watched.task
        stored = StoredPreview(task.attempt, watched.step, preview.index, encoded(preview.image))
        self._previews.put(task.id, stored)


def encoded(image: Image.Image) -> bytes:
    """A small JPEG; a browser enlarges it smoothly."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
