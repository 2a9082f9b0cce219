"""The worker's loop: claims tasks, runs them in groups, records how they ended.

``step`` is one group of tasks from claim to finish, in plain order; a group is one task unless
several are denoised together. Identical lanes run it side by side, so that while one group is on
the device the next one's pictures are being fetched and the last one's images are being checked,
encoded and stored. Most lanes are for groups whose pictures come slowly, and wait otherwise.

Knows no HTTP and no torch, and neither pictures nor pipelines: those are for
``redux_server.worker.batch``.
"""

import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import structlog
from sqlalchemy.exc import SQLAlchemyError

from redux_pipelines.errors import DeviceError
from redux_server import metrics
from redux_server.storage.disk import Ballast
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import Outcome, Task
from redux_server.worker.batch import BatchRunner
from redux_server.worker.leased import EndRecorder, LeasedTask
from redux_server.worker.outputs import Postponed
from redux_server.worker.prefetch import AHEAD, SLOW, UNSTORED, Place, Prefetch

LANES = AHEAD + SLOW + UNSTORED
POLL_S = 0.5
CANCEL_PATIENCE_S = 3.0
"""How long a step may go on before a cancelled task need not wait for its end."""
LOST_DEVICE_GRACE_S = 3.0
"""How long the other lanes of a worker that lost its device may go on with what is off it."""
_log = structlog.get_logger("redux_server.worker.loop")


class Worker:
    """Works off tasks on one device until stopped, or until the device is lost.

    It looks for work every ``poll_s`` seconds and whenever it is woken. While a group is on its
    device, it leaves what waits to idle workers for ``defer_s`` seconds before it takes a task that
    can only wait for the device.

    Up to ``max_batch_size`` images of tasks of one shape are denoised together; for the first of
    them, the others have ``batch_timeout_s`` seconds to come.

    It takes tasks that were accepted for one of the fingerprints that ``accepts`` gives, or any if
    that gives none. Once stopped, it finishes what is on the device within ``drain_timeout_s``
    seconds. With ``ends_process`` a device that hangs and holds the interpreter's lock ends the
    process.
    """

    def __init__(
        self,
        worker_id: str,
        *,
        store: TaskStore,
        runner: BatchRunner,
        ballast: Ballast | None = None,
        max_batch_size: int = 1,
        batch_timeout_s: float = 0.0,
        heartbeat_s: float = 0.5,
        poll_s: float = POLL_S,
        defer_s: float = 0.0,
        accepts: Callable[[], Collection[str]] = lambda: (),
        drain_timeout_s: float = math.inf,
        ends_process: bool = False,
    ) -> None:
        self._id = worker_id
        self._store = store
        self._runner = runner
        self._ballast = ballast or Ballast(Path(), size_bytes=0)
        self._recorder = EndRecorder(store, self._ballast)
        self._max_batch_size = max_batch_size
        self._batch_timeout_s = batch_timeout_s
        self._heartbeat_s = heartbeat_s
        self._leased: dict[str, LeasedTask] = {}
        self._stopping = threading.Event()
        self._poll_s = poll_s
        self._defer_s = defer_s
        self._accepts = accepts
        self._guards: tuple[threading.Thread, ...] = ()
        self._is_database_away = False
        self._drain_timeout_s = drain_timeout_s
        self._ends_process = ends_process
        self._work_arrived = threading.Event()
        self._has_looked = threading.Event()
        self._is_claiming = False
        self._claiming = threading.Lock()
        self._has_ended = threading.Event()
        self._prefetch = Prefetch(self.wake)
        self._lanes_end_at = math.inf
        self.device_failure: DeviceError | None = None
        self.is_stuck = False
        """Whether ``run`` left a lane behind: only the process's end ends what that waits for."""

    def wake(self) -> None:
        """There may be work: look now instead of at the next poll."""
        self._work_arrived.set()

    def look(self, timeout_s: float) -> bool:
        """Wake, and wait until the store was asked for work; False if that takes too long.

        False at once while there is a group on the device, or images have nowhere to go: an idle
        worker is to have the next task, and we look by ourselves as soon as there is room.
        """
        if not self._is_claiming or not self._runner.device_is_idle.is_set():
            return False
        self._has_looked.clear()
        self.wake()
        return self._has_looked.wait(timeout_s) and not self.is_stopping

    def is_alive(self) -> bool:
        """Whether the threads run that it cannot do without; before ``run`` there are none."""
        return all(thread.is_alive() for thread in self._guards)

    def obstacle(self) -> str:
        """Why it would not take a task just now; empty if it would."""
        if self.is_stopping:
            return "the worker is stopping"
        if self._is_database_away:
            return "the database does not answer"
        return self._runner.obstacle

    @property
    def is_stopping(self) -> bool:
        """True once nothing more is claimed."""
        return self._stopping.is_set()

    def wait_until_stopping(self) -> None:
        """Return when nothing more is claimed."""
        self._stopping.wait()

    def stop(self) -> None:
        """Claim nothing more; what is on the device is finished. Callable from a signal handler."""
        self._lanes_end_at = min(self._lanes_end_at, time.monotonic() + self._drain_timeout_s)
        self._stopping.set()
        self._runner.stop()
        self._prefetch.stop()
        self._work_arrived.set()
        self._has_looked.set()

    def run(self) -> None:
        """Work until ``stop``; then return what was claimed but not begun.

        Also ends when the device is lost or hangs, and sets ``device_failure``: nothing in this
        process can use it again. A lane that still waits for something is then left behind, as it
        is when it takes longer than the stopped worker has (``is_stuck``).
        """
        lanes = [
            threading.Thread(target=self._lane, name=f"lane-{i}", daemon=True) for i in range(LANES)
        ]
        heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        watch = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        for thread in (*lanes, heart, watch):
            thread.start()
        self._guards = (heart, watch)
        for lane in lanes:
            while lane.is_alive() and time.monotonic() < self._lanes_end_at:
                lane.join(0.1)
        self.is_stuck = any(lane.is_alive() for lane in lanes)
        self._has_ended.set()
        heart.join()
        watch.join()
        self._store.release(self._id, has_crashed=False)

    def step(self) -> bool:
        """Work off one group. False when none came before ``stop`` (or, once stopped, at once)."""
        place = self._prefetch.take()
        try:
            group = self._claim(place)
            try:
                self._work(group, place)
            finally:
                for leased in group:
                    self._forget(leased)
            return bool(group)
        finally:
            place.leave()

    def _work(self, group: Sequence[LeasedTask], place: Place) -> None:
        try:
            for leased, outcome in self._runner.work(group, place, has_left=self.wake):
                if isinstance(outcome, Postponed):
                    with leased.logged():
                        self._recorder.postpone(leased, outcome)
                elif outcome is not None:
                    with leased.logged():
                        self._recorder.finish(leased, outcome)
                self._forget(leased)
        except DeviceError as error:
            self._lose_device(error, group)

    def _lose_device(self, error: DeviceError, group: Sequence[LeasedTask]) -> None:
        """End, as nothing here can use the device again; ``group`` had a part in that."""
        self.stop()
        for leased in group:
            if self._leased.get(leased.task.id) is leased:
                self._recorder.give_back(leased, str(error))
        _log.error("the device failed, so this worker ends", exc_info=error)
        self.device_failure = error
        self._lanes_end_at = min(self._lanes_end_at, time.monotonic() + LOST_DEVICE_GRACE_S)

    def _watch(self) -> None:
        """See to it that a device that hangs is noticed; its own thread cannot."""

        def lose(reason: str) -> None:
            self._lose_device(DeviceError(reason), self._runner.on_device)

        self._runner.watchdog.keep(self._has_ended, lose, ends_process=self._ends_process)

    def _lane(self) -> None:
        while not self._stopping.is_set():
            try:
                self.step()
            except Exception as error:  # the database may be away; the lane must outlive that
                _log.error("worker step failed", exc_info=error)
                self._stopping.wait(1.0)

    def _claim(self, place: Place) -> list[LeasedTask]:
        with self._claiming:  # the next lane is to know what this one has found
            while not self._stopping.is_set():
                self._runner.wait_until_usable()
                claimed = self._look_for_work()
                if claimed:
                    metrics.REDELIVERIES.inc(sum(task.crashes > 0 for task in claimed))
                    group = [self._lease(task) for task in claimed]
                    self._fill_batch(group)
                    tasks = [each.task for each in group]
                    place.hold({task.key_id for task in tasks}, tasks[0].priority)
                    return group
        return []

    def _look_for_work(self) -> list[Task]:
        """Ask the store once, when others had their turn; if in vain, wait for the next time."""
        self._is_claiming = True
        try:
            self._runner.device_is_idle.wait(self._defer_s)
            self._work_arrived.clear()
            if self.is_stopping:  # asked after clearing, so that the wake of ``stop`` is not lost
                return []
            claimed = self._ask_the_store()
            self._has_looked.set()
            if not claimed:
                self._work_arrived.wait(self._poll_s)
            return claimed
        finally:
            self._is_claiming = False

    def _ask_the_store(self) -> list[Task]:
        try:
            may = self._prefetch.claimable()
            claimed = self._store.claim(
                self._id,
                without=may.without,
                priority=may.priority,
                accepted_for=self._accepts(),
            )
        except SQLAlchemyError:
            self._is_database_away = True
            raise
        self._is_database_away = False
        return claimed

    def _fill_batch(self, group: list[LeasedTask]) -> None:
        """Claim more tasks of the first one's shape, as far as there is room for their images.

        They are taken one by one, for each may want several images: the last may bring more than
        there is room for, and these are then made after the others. What was ever given back by a
        dead worker has no shape, and so is alone.
        """
        shape, ends_at = group[0].task.shape, time.monotonic() + self._batch_timeout_s
        while shape and not group[0].is_suspect and self._room(group) > 0:
            if self._stopping.is_set():
                return
            self._work_arrived.clear()
            try:
                more = self._store.claim(
                    self._id,
                    like=shape,
                    without=self._prefetch.claimable().without,
                    accepted_for=self._accepts(),
                )
            except SQLAlchemyError as error:  # those that are here need not suffer for it
                _log.error("cannot look for more tasks of a batch", exc_info=error)
                return
            group += [self._lease(task) for task in more]
            remaining_s = ends_at - time.monotonic()
            if not more and remaining_s <= 0:
                return
            if not more:
                self._work_arrived.wait(min(POLL_S, remaining_s))

    def _room(self, group: Sequence[LeasedTask]) -> int:
        images = sum(int(leased.task.input["num_images"]) for leased in group)
        return self._max_batch_size - images

    def _lease(self, task: Task) -> LeasedTask:
        former = self._leased.get(task.id)
        if former is not None:  # a lane lost it while this process was frozen, another has it now
            former.is_lost = True
        leased = self._leased[task.id] = LeasedTask(task)
        return leased

    def _forget(self, leased: LeasedTask) -> None:
        if self._leased.get(leased.task.id) is leased:
            del self._leased[leased.task.id]

    def _beat(self) -> None:
        """Renew leases while ``run`` does, draining included."""
        while not self._has_ended.wait(self._heartbeat_s):
            try:
                self._renew()
            except SQLAlchemyError as error:
                _log.error("heartbeat failed", exc_info=error)

    def _renew(self) -> None:
        leased = dict(self._leased)
        if not leased:
            return
        progress = {key: (each.task.attempt, each.step) for key, each in leased.items()}
        lease = self._ballast.make_room_for(lambda: self._store.renew(self._id, progress))
        for task_id in lease.lost:
            leased[task_id].is_lost = True
        for task_id in lease.cancelled:
            leased[task_id].is_cancelled = True
        if self._runner.watchdog.waited_s > CANCEL_PATIENCE_S:
            self._end_cancelled()

    def _end_cancelled(self) -> None:
        """Record the end of what was cancelled without waiting for a step that may never end."""
        for leased in self._runner.on_device:
            if leased.is_cancelled and not leased.is_lost:
                with leased.logged():
                    self._recorder.finish(leased, Outcome.cancellation())
                leased.is_lost = True
