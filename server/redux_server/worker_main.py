"""The worker process: loads the pipeline, warms it up, then works until told to stop.

The one module of the server that loads torch (through the pipeline).
"""

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import structlog
from PIL import Image

from redux_pipelines.errors import ReduxError
from redux_pipelines.types import GenerationRequest, Pipeline, SafetyChecker
from redux_server import device_lock, metrics
from redux_server.blobs import Blobs, Signer, signing_secret
from redux_server.compile_plan import compile_plan, wants_compile
from redux_server.database import open_database
from redux_server.fetch import ImageFetcher
from redux_server.images import ImageLoader
from redux_server.netguard import AddressPolicy
from redux_server.presence import EXIT_CANNOT_LOAD, Presence, WorkerState, worker_id
from redux_server.settings import ServerSettings
from redux_server.store import TaskStore
from redux_server.worker import Worker

_WAITING = "waiting for the previous worker of this device to end"
_log = structlog.get_logger("redux_server.worker_main")


def run_worker(settings: ServerSettings, *, device: str, is_supervised: bool) -> int:
    """Run the worker of one device until a signal; returns an exit code.

    With ``is_supervised``, each line on standard input means "there is work", and its end means
    "your supervisor is gone: finish and leave".
    """
    supervisor = _Supervisor()
    if is_supervised:
        supervisor.listen()
    engine = open_database(settings.database_url)
    presence = Presence(engine)
    name = worker_id(device)
    store = TaskStore(engine, lease_s=settings.lease_s, max_attempts=settings.max_attempts)

    def announce(state: WorkerState, detail: str = "") -> None:
        presence.announce(name, device, state, detail)

    def say_waiting() -> None:
        announce(WorkerState.LOADING, _WAITING)
        _log.warning(_WAITING, device=device)

    path = device_lock.lock_path(settings, device)
    with presence.kept_alive(name), device_lock.holding(path, before_waiting=say_waiting):
        store.release(name)  # left by a predecessor that died: the lock says it is gone
        announce(WorkerState.LOADING)
        with ThreadPoolExecutor(1, thread_name_prefix="device") as device_thread:
            try:
                pipeline, safety = device_thread.submit(_load, settings, device).result()
            except Exception as error:
                announce(WorkerState.FAILED, _reason(error))
                _log.error("cannot load the model", reason=str(error), exc_info=error)
                return EXIT_CANNOT_LOAD
            blobs = Blobs(settings.blobs_dir)
            signer = Signer(signing_secret(engine), clock=time.time)
            worker = Worker(
                name,
                store=store,
                blobs=blobs,
                images=_image_loader(settings, blobs, signer),
                pipeline=pipeline,
                safety=safety,
                device=device_thread,
                force_safety=settings.force_safety_checker,
            )
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: worker.stop())
            supervisor.attach(worker)
            announce(WorkerState.READY, _describe(pipeline, settings))
            _log.info("worker ready", device=device, model=pipeline.info.name)
            worker.run()
        presence.leave(name)
    return 0


def _reason(error: Exception) -> str:
    """Why the model cannot be loaded, for whoever asks ``/readyz``."""
    if isinstance(error, (ReduxError, ValueError)):  # both say what to do
        return str(error)
    return f"{type(error).__name__} while loading the model; the worker's log says more"


def _load(settings: ServerSettings, device: str) -> tuple[Pipeline, SafetyChecker]:
    from redux_pipelines.loading import load_pipeline
    from redux_pipelines.safety import OpenNsfwChecker

    started = time.perf_counter()
    pipeline = load_pipeline(**{**settings.pipeline_options(), "device": device})
    safety = OpenNsfwChecker(threshold=settings.safety_threshold)
    if wants_compile(settings):
        _compile(pipeline, settings)
    _warm_up(pipeline, safety)
    _log.info("model loaded", seconds=round(time.perf_counter() - started, 1))
    return pipeline, safety


def _compile(pipeline: Pipeline, settings: ServerSettings) -> None:
    """Before the first task, so that it need not wait; what fails is left out, and said."""
    report = pipeline.compile(compile_plan(settings))
    metrics.COMPILED.set(report.mode != "off")
    for failure in report.failures:
        metrics.COMPILE_FAILURES.inc()
        _log.warning("running without", reason=failure)
    _log.info("compiled", **asdict(report))


def _warm_up(pipeline: Pipeline, safety: SafetyChecker) -> None:
    """Make one small image, so that the first task does not pay for lazy start-up."""
    request = GenerationRequest(
        Image.new("RGB", (64, 64), "gray"), width=512, height=512, num_inference_steps=1
    )
    *_, result = pipeline.generate(request)
    safety.check(result.images)  # type: ignore[union-attr]  # the last event is the result


def _describe(pipeline: Pipeline, settings: ServerSettings) -> str:
    info = pipeline.info
    attention = f" with {info.attention} attention" if info.attention else ""
    text = f"{info.name}, {info.backend} backend{attention}, {info.dtype} on {info.device}"
    if info.compiled != "off":
        return f"{text}, compiled ({info.compiled})"
    return text if settings.compile == "off" else f"{text}, not compiled: its log says why"


def _image_loader(settings: ServerSettings, blobs: Blobs, signer: Signer) -> ImageLoader:
    policy = AddressPolicy.from_entries(settings.fetch_allow_entries)
    return ImageLoader(blobs, signer, ImageFetcher(policy))


class _Supervisor:
    """The other end of standard input, while we wait, load and work."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._attaching = threading.Lock()

    def listen(self) -> None:
        """Start to pass on what it says."""
        threading.Thread(target=self._listen, name="supervisor", daemon=True).start()

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
