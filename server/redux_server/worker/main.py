"""The worker process: loads its model, then works until told to stop.

Builds the parts of a worker from the settings, once per process, and ties them to signals, to the
supervisor and to the broker. Knows neither how a task is worked on nor what a pipeline is made of.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from redux_pipelines.contract.types import Pipeline, SafetyChecker
from redux_pipelines.errors import DeviceError, DeviceMemoryError, ReduxError, WeightsAway
from redux_server import logs, metrics
from redux_server.database.clock import clock_of
from redux_server.database.migration import open_database
from redux_server.dispatch.choice import check_dispatch
from redux_server.dispatch.device import device_lock, lock_path, worker_id
from redux_server.dispatch.fingerprint import Served, fingerprint_of
from redux_server.dispatch.local import worker_devices
from redux_server.dispatch.presence import (
    EXIT_CANNOT_LOAD,
    EXIT_DEVICE_FAILED,
    EXIT_NOT_YET,
    Presence,
    WorkerState,
)
from redux_server.net.fetch import ImageFetcher
from redux_server.net.guard import AddressPolicy
from redux_server.pictures.decode import confinement_gap
from redux_server.private_files import make_new_files_private, private_folder
from redux_server.settings import ServerSettings, UsageError
from redux_server.storage.blobs import BlobStore, StorageError
from redux_server.storage.opening import open_ballast, open_pictures
from redux_server.storage.signing import Signer, signing_secret
from redux_server.storage.temporary import check_room, nameless_file
from redux_server.tasks.previews import Previews
from redux_server.tasks.store import TaskStore
from redux_server.worker.batch import BatchRunner
from redux_server.worker.inputs import ImageLoader
from redux_server.worker.loop import POLL_S, Worker
from redux_server.worker.model import check_parallel, describe_model, load_model
from redux_server.worker.previews import PreviewSender
from redux_server.worker.probes import WorkerProbes, serve
from redux_server.worker.watchdog import Watchdog

_WAITING = (
    "another worker has this device and data directory, of a second server or of one that ends; "
    "waiting for its end"
)
_ENDING = "finishes what it has begun, and ends"
_SLOW_POLL_S = 3.0  # of a worker that gets tickets, of which some may be lost
_DEFER_S = 1.2 * POLL_S  # every idle worker has looked by then
_log = structlog.get_logger("redux_server.worker.main")


def worker(settings: ServerSettings, *, supervised: bool) -> int:
    """``flux-redux worker``: run the worker of the one device that ``settings`` name.

    Raises:
        UsageError: several devices, or what ``--dispatch`` lacks.
    """
    check_dispatch(settings)
    check_parallel(settings)
    found = worker_devices(settings.device, settings.parallel)
    if len(found) > 1:
        count = "one device" if settings.parallel == 1 else f"{settings.parallel} devices"
        raise UsageError(f"a worker has {count}; choose --device from {' or '.join(found)}")
    logs.configure(format_=settings.log_format, level=settings.log_level)
    return run_worker(settings, device=found[0], is_supervised=supervised)


def run_worker(settings: ServerSettings, *, device: str, is_supervised: bool) -> int:
    """Run the worker of one device until a signal; returns an exit code.

    A device that is lost or hangs ends the process from here, with ``EXIT_DEVICE_FAILED``.

    With ``is_supervised``, each line on standard input means "there is work", and its end means
    "your supervisor is gone: finish and leave"; standard output is for metrics.
    """
    make_new_files_private()
    private_folder(settings.data_dir)
    supervisor = _Supervisor()
    probes = WorkerProbes()
    if is_supervised:
        supervisor.listen()
    else:
        _answer_probes(settings, probes)
    database = open_database(settings.database)
    clock = clock_of(database)
    presence = Presence(database, clock=clock)
    announce = _Announcer(presence, worker_id(settings.data_dir, device), device, probes)
    store = _open_store(settings, database, clock)
    lock = device_lock(lock_path(settings, device), before_waiting=announce.waiting)
    with lock, presence.kept_alive(announce.name):
        store.release(announce.name)  # left by a predecessor that died: the lock says it is gone
        if not (is_supervised and presence.has_failed(announce.name)):
            announce(WorkerState.LOADING)  # else it stays failed while its supervisor tries again
        with ThreadPoolExecutor(1, thread_name_prefix="device") as device_thread:
            watchdog = Watchdog(limit_s=settings.step_timeout_s)
            try:
                blobs, model = _load(settings, device, device_thread, watchdog)
            except Exception as error:
                code = _give_up(error, announce, is_supervised=is_supervised)
                supervisor.close()
                return code
            signer = Signer(signing_secret(database), clock=clock)
            fingerprint = fingerprint_of(model[0].info.weights or settings.model)
            kept = blobs, signer, Previews(database, clock=clock)
            worker = Worker(
                announce.name,
                store=store,
                runner=_runner(settings, announce.name, kept, model, (device_thread, watchdog)),
                ballast=open_ballast(settings),
                accepts=Served(fingerprint, store, presence),
                ends_process=True,
                **_pace(settings, is_supervised=is_supervised),
            )
            _stop_at_signals(worker)
            supervisor.attach(worker)
            probes.is_alive, probes.obstacle = worker.is_alive, worker.obstacle
            announce.ready(describe_model(model[0], settings), model[0].info.name, fingerprint)
            _log.info("worker ready", device=device, model=model[0].info.name)
            has_tickets = _has_tickets(settings, is_supervised=is_supervised)
            with _tickets(settings, database, worker, wanted=has_tickets):
                with _told_when_stopping(worker, announce):
                    worker.run()
                supervisor.close()
                _end_if_stuck(worker, announce)
        presence.leave(announce.name)
    return 0


def _load(
    settings: ServerSettings, device: str, device_thread: Executor, watchdog: Watchdog
) -> tuple[BlobStore, tuple[Pipeline, SafetyChecker]]:
    """What the worker needs that may not be there; raises whatever tells so."""
    blobs = open_pictures(settings)
    blobs.check()
    loading = device_thread.submit(load_model, settings, device, watchdog.learn)
    _check_decoder()
    return blobs, loading.result()


def _check_decoder() -> None:
    """Have the log say, once and early, what decoding lacks on this machine."""
    try:
        confinement_gap()
    except Exception as error:
        _log.error("pictures cannot be decoded", exc_info=error)


@contextlib.contextmanager
def _told_when_stopping(
    worker: Worker, announce: Callable[[WorkerState, str], None]
) -> Iterator[None]:
    """Say so as soon as the worker takes no more tasks, though it may finish some for a minute."""

    def wait() -> None:
        worker.wait_until_stopping()
        with contextlib.suppress(SQLAlchemyError):
            announce(WorkerState.LOADING, _ENDING)

    thread = threading.Thread(target=wait, name="stopping", daemon=True)
    thread.start()
    try:
        yield
    finally:
        worker.stop()
        thread.join()


class _Announcer:
    """Says how this worker is: in the list of workers, and to whoever asks it."""

    def __init__(self, presence: Presence, name: str, device: str, probes: WorkerProbes) -> None:
        self.name = name
        self.presence = presence
        self._device = device
        self._probes = probes

    def __call__(self, state: WorkerState, detail: str = "", **runs: str) -> None:
        self._probes.state, self._probes.detail = state.value, detail
        self.presence.announce(self.name, self._device, state, detail, **runs)

    def waiting(self) -> None:
        """Another process has the device, and the row in the list with it."""
        self._probes.detail = _WAITING
        _log.warning(_WAITING, device=self._device)

    def ready(self, detail: str, model: str, fingerprint: str) -> None:
        """From now on it takes tasks."""
        self(WorkerState.READY, detail, model=model, fingerprint=fingerprint)


def _give_up(error: Exception, announce: _Announcer, *, is_supervised: bool) -> int:
    """Say why there is no model; returns the exit code that says whether to try again."""
    reason, is_known = _reason(error), _says_what_to_do(error)
    has_said = announce.presence.detail_of(announce.name) == reason
    announce(WorkerState.FAILED, reason)
    if not is_known:
        # Each try would end in the same way: one traceback is enough.
        _log.error("cannot start", reason=str(error), exc_info=None if has_said else error)
    elif not is_supervised:  # a supervisor says it, and only once
        _log.error("cannot start", reason=reason)
    is_permanent = isinstance(error, (ReduxError, ValueError)) and not isinstance(
        error, (WeightsAway, DeviceError, DeviceMemoryError)
    )
    return EXIT_CANNOT_LOAD if is_permanent else EXIT_NOT_YET


def _pace(settings: ServerSettings, *, is_supervised: bool) -> dict[str, Any]:
    """How a worker paces its looks for work, and its end."""
    has_tickets = _has_tickets(settings, is_supervised=is_supervised)
    return {
        "max_batch_size": settings.max_batch_size,
        "batch_timeout_s": settings.batch_timeout / 1000,
        "poll_s": _SLOW_POLL_S if has_tickets else POLL_S,
        "defer_s": 0.0 if is_supervised else _DEFER_S,
        "drain_timeout_s": settings.drain_timeout_s,
    }


def _has_tickets(settings: ServerSettings, *, is_supervised: bool) -> bool:
    return settings.dispatch == "celery" and not is_supervised


def _stop_at_signals(worker: Worker) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's
            signal.signal(number, lambda *_: worker.stop())


def _end_if_stuck(worker: Worker, announce: _Announcer) -> None:
    """End the process, at once, if the worker lost its device, or left a lane behind."""
    if worker.device_failure is not None:
        with contextlib.suppress(SQLAlchemyError):  # whoever starts us again says so too
            announce(WorkerState.FAILED, f"{worker.device_failure}; the worker has ended")
        _end_process(EXIT_DEVICE_FAILED)
    if worker.is_stuck:
        _log.warning("a task did not end in time, and goes back to the queue")
        with contextlib.suppress(SQLAlchemyError):
            announce.presence.leave(announce.name)
        _end_process(0)


def _end_process(code: int) -> NoReturn:
    """End now: a lane may wait for something, and to tidy up a lost device may wait for ever."""
    for listing in Path("/proc/self/task").glob("*/children"):
        # Ranks that compute with us may hang as we do, and hold their devices.
        with contextlib.suppress(OSError):
            for pid in listing.read_text().split():
                os.kill(int(pid), signal.SIGKILL)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _answer_probes(settings: ServerSettings, probes: WorkerProbes) -> None:
    if settings.metrics_port:
        try:
            serve(settings.host, settings.metrics_port, probes)
        except OSError as error:
            raise UsageError(
                f"cannot answer probes on {settings.host}:{settings.metrics_port}: "
                f"{error.strerror}; choose another --metrics-port or --host"
            ) from None


def _open_store(
    settings: ServerSettings, database: Engine, clock: Callable[[], float]
) -> TaskStore:
    return TaskStore(
        database, lease_s=settings.lease_s, max_attempts=settings.max_attempts, clock=clock
    )


def _says_what_to_do(error: Exception) -> bool:
    return isinstance(error, (ReduxError, ValueError, StorageError))


def _reason(error: Exception) -> str:
    """Why no work can be done, for whoever asks ``/readyz``."""
    if _says_what_to_do(error):
        return str(error)
    return f"{type(error).__name__} while loading the model; the worker's log says more"


def _tickets(
    settings: ServerSettings, database: Engine, worker: Worker, *, wanted: bool
) -> AbstractContextManager[None]:
    """Take what the broker has for us meanwhile, if that is ``wanted``."""
    if not wanted:
        return nullcontext()
    from redux_server.dispatch.celery import queue_name, ticket_app
    from redux_server.dispatch.celery_worker import receiving

    return receiving(ticket_app(settings.broker_url, queue_name(signing_secret(database))), worker)


def _runner(
    settings: ServerSettings,
    worker_id: str,
    kept: tuple[BlobStore, Signer, Previews],
    model: tuple[Pipeline, SafetyChecker],
    device: tuple[Executor, Watchdog],
) -> BatchRunner:
    blobs, signer, previews = kept
    pipeline, safety = model
    policy = AddressPolicy.from_entries(settings.fetch_allow_entries)
    temporary = settings.temporary_dir
    fetcher = ImageFetcher(policy, open_file=partial(nameless_file, temporary))
    return BatchRunner(
        images=ImageLoader(blobs, signer, fetcher, settings.max_image_pixels),
        pipeline=pipeline,
        safety=safety,
        blobs=blobs,
        check_room=partial(check_room, temporary),
        worker_id=worker_id,
        device=device[0],
        force_safety=settings.force_safety_checker,
        watchdog=device[1],
        previews=_sender(settings, previews),
    )


def _sender(settings: ServerSettings, previews: Previews) -> PreviewSender | None:
    """None where every image is to be checked: nobody checks a preview."""
    return None if settings.force_safety_checker else PreviewSender(previews)


class _Supervisor:
    """The other end of standard input and output, while we wait, load and work."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._attaching = threading.Lock()
        self._reporter: metrics.Reporter | None = None

    def listen(self) -> None:
        """Start to pass on what it says, and to report metrics; what we print goes to the log."""
        self._reporter = metrics.Reporter(os.dup(sys.stdout.fileno()))
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._reporter.start()
        threading.Thread(target=self._listen, name="supervisor", daemon=True).start()

    def close(self) -> None:
        """Report the last metrics."""
        if self._reporter is not None:
            self._reporter.close()

    def attach(self, worker: Worker) -> None:
        """From now on there is someone to tell."""
        with self._attaching:
            self._worker = worker

    def _listen(self) -> None:
        # Not sys.stdin: a thread that blocks in it makes the interpreter abort at its exit.
        while os.read(sys.stdin.fileno(), 4096):
            if self._worker is not None:
                self._worker.wake()
        with self._attaching:
            if self._worker is None:
                # We hold no task yet. To wait for the device and load the model all the same
                # would only keep it from the worker of the next supervisor.
                os._exit(0)
            self._worker.stop()
