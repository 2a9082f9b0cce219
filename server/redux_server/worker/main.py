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
from typing import NoReturn

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from redux_pipelines.contract.types import Pipeline, SafetyChecker
from redux_pipelines.errors import ReduxError
from redux_server import logs, metrics
from redux_server.database.clock import clock_of
from redux_server.database.migration import open_database
from redux_server.dispatch.choice import check_dispatch
from redux_server.dispatch.device import device_lock, lock_path, worker_id
from redux_server.dispatch.local import worker_devices
from redux_server.dispatch.presence import (
    EXIT_CANNOT_LOAD,
    EXIT_DEVICE_FAILED,
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
from redux_server.tasks.store import TaskStore
from redux_server.worker.batch import BatchRunner
from redux_server.worker.inputs import ImageLoader
from redux_server.worker.loop import POLL_S, Worker
from redux_server.worker.model import check_parallel, describe_model, load_model

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

    A device that is lost ends the process from here, with ``EXIT_DEVICE_FAILED``.

    With ``is_supervised``, each line on standard input means "there is work", and its end means
    "your supervisor is gone: finish and leave"; standard output is for metrics.
    """
    make_new_files_private()
    private_folder(settings.data_dir)
    supervisor = _Supervisor()
    if is_supervised:
        supervisor.listen()
    else:
        _show_metrics(settings)
    has_tickets = settings.dispatch == "celery" and not is_supervised
    database = open_database(settings.database)
    clock = clock_of(database)
    presence = Presence(database, clock=clock)
    name = worker_id(settings.data_dir, device)
    store = _open_store(settings, database, clock)

    def announce(state: WorkerState, detail: str = "") -> None:
        presence.announce(name, device, state, detail)

    # To the log alone: the row in the database is that of who has the device.
    say_waiting = partial(_log.warning, _WAITING, device=device)
    path = lock_path(settings, device)
    with device_lock(path, before_waiting=say_waiting), presence.kept_alive(name):
        store.release(name)  # left by a predecessor that died: the lock says it is gone
        announce(WorkerState.LOADING)
        with ThreadPoolExecutor(1, thread_name_prefix="device") as device_thread:
            try:
                blobs, (pipeline, safety) = _load(settings, device, device_thread)
            except Exception as error:
                announce(WorkerState.FAILED, _reason(error))
                supervisor.close()
                return _cannot_load(error)
            signer = Signer(signing_secret(database), clock=clock)
            worker = Worker(
                name,
                store=store,
                runner=_runner(settings, name, (blobs, signer), (pipeline, safety), device_thread),
                ballast=open_ballast(settings),
                max_batch_size=settings.max_batch_size,
                batch_timeout_s=settings.batch_timeout / 1000,
                poll_s=_SLOW_POLL_S if has_tickets else POLL_S,
                defer_s=0.0 if is_supervised else _DEFER_S,
            )
            _stop_at_signals(worker)
            supervisor.attach(worker)
            announce(WorkerState.READY, describe_model(pipeline, settings))
            _log.info("worker ready", device=device, model=pipeline.info.name)
            with _tickets(settings, database, worker, wanted=has_tickets):
                with _told_when_stopping(worker, announce):
                    worker.run()
                supervisor.close()
                _end_if_lost(worker, announce)
        presence.leave(name)
    return 0


def _load(
    settings: ServerSettings, device: str, device_thread: Executor
) -> tuple[BlobStore, tuple[Pipeline, SafetyChecker]]:
    """What the worker needs that may not be there; raises whatever tells so."""
    blobs = open_pictures(settings)
    blobs.check()
    loading = device_thread.submit(load_model, settings, device)
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


def _cannot_load(error: Exception) -> int:
    _log.error("cannot start", reason=str(error), exc_info=error)
    return EXIT_CANNOT_LOAD


def _stop_at_signals(worker: Worker) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())


def _end_if_lost(worker: Worker, announce: Callable[[WorkerState, str], None]) -> None:
    """End the process, at once, if ``worker`` lost its device."""
    if worker.device_failure is not None:
        with contextlib.suppress(SQLAlchemyError):  # whoever starts us again says so too
            announce(WorkerState.FAILED, f"{worker.device_failure}; the worker has ended")
        _end_process(EXIT_DEVICE_FAILED)


def _end_process(code: int) -> NoReturn:
    """End now: a lane may wait for something, and to tidy up a lost device may wait for ever."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _show_metrics(settings: ServerSettings) -> None:
    if settings.metrics_port:
        try:
            metrics.serve(settings.host, settings.metrics_port)
        except OSError as error:
            raise UsageError(
                f"cannot show metrics on {settings.host}:{settings.metrics_port}: "
                f"{error.strerror}; choose another --metrics-port or --host"
            ) from None


def _open_store(
    settings: ServerSettings, database: Engine, clock: Callable[[], float]
) -> TaskStore:
    return TaskStore(
        database, lease_s=settings.lease_s, max_attempts=settings.max_attempts, clock=clock
    )


def _reason(error: Exception) -> str:
    """Why no work can be done, for whoever asks ``/readyz``."""
    if isinstance(error, (ReduxError, ValueError, StorageError)):  # they say what to do
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
    pictures: tuple[BlobStore, Signer],
    model: tuple[Pipeline, SafetyChecker],
    device: Executor,
) -> BatchRunner:
    blobs, signer = pictures
    pipeline, safety = model
    policy = AddressPolicy.from_entries(settings.fetch_allow_entries)
    temporary = settings.temporary_dir
    fetcher = ImageFetcher(policy, open_file=partial(nameless_file, temporary))
    return BatchRunner(
        images=ImageLoader(blobs, signer, fetcher),
        pipeline=pipeline,
        safety=safety,
        blobs=blobs,
        check_room=partial(check_room, temporary),
        worker_id=worker_id,
        device=device,
        force_safety=settings.force_safety_checker,
    )


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
