"""Ten requests through the server itself: HTTP, tasks, database, worker, pictures, files.

The API and a worker run as threads of this process, so that the worker has the report's pipeline;
a client polls over loopback as a user's would. The safety checker flags nothing: it is not what is
measured. Needs what the server needs (fastapi, SQLAlchemy and others).
"""

import base64
import io
import json
import socket
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from gpu_report.runner import NotRun, Section
from gpu_report.subject import Subject, a_picture
from redux_pipelines.images.safety import NullChecker
from redux_pipelines.pipeline import ReduxPipeline

SUBMIT = "/api/v3/wavespeed-ai/flux-pro-redux"
RESULT = "/api/v3/predictions/{}/result"
POLL_S = 0.05
NEEDED = ("fastapi", "fastapi_offline", "uvicorn", "httptools", "httpcore", "sqlalchemy",
          "alembic", "obstore", "structlog", "prometheus_client", "pydantic",
          "multipart")  # fmt: skip


def ten_requests(subject: Subject, section: Section, alone: Mapping[str, Any]) -> None:
    """All submitted at once, then followed to their ends; beside the pipeline's own time."""
    _require_packages()
    pipeline, scale = subject.pipeline(), subject.scale
    body = {
        "image": _data_uri(),
        "size": f"{scale.side}*{scale.side}",
        "num_inference_steps": scale.steps,
        "enable_safety_checker": False,
    }
    with tempfile.TemporaryDirectory() as folder, _serving(pipeline, Path(folder)) as (url, key):
        _finish(url, key, _submit(url, key, {**body, "seed": 0}))  # warms up
        started = time.perf_counter()
        ids = [_submit(url, key, {**body, "seed": 1 + i}) for i in range(scale.requests)]
        submitted_s = time.perf_counter() - started
        ends = [_finish(url, key, each) for each in ids]
        whole_s = time.perf_counter() - started
    section.update(
        requests=scale.requests,
        side=scale.side,
        steps=scale.steps,
        submitted_s=round(submitted_s, 4),
        whole_s=round(whole_s, 4),
        per_request_s=round(whole_s / scale.requests, 4),
        completed=ends.count("completed"),
        ratio_to_pipeline=None,
    )
    if "median_s" in alone:
        section["ratio_to_pipeline"] = round(section["per_request_s"] / alone["median_s"], 4)
    if section["completed"] != scale.requests:
        raise RuntimeError(f"{scale.requests - section['completed']} requests did not complete")


def _require_packages() -> None:
    for name in NEEDED:
        try:
            import_module(name)
        except ImportError as error:
            raise NotRun(f"the server needs {name}, which cannot be imported: {error}") from error


@contextmanager
def _serving(pipeline: ReduxPipeline, folder: Path) -> Iterator[tuple[str, str]]:
    """The URL and a key of a server over ``folder`` that works with ``pipeline``."""
    import uvicorn

    from redux_server import logs
    from redux_server.api.app import build_app
    from redux_server.api.http_server import BoundedHttpProtocol
    from redux_server.api.services import assemble
    from redux_server.database.migration import open_database
    from redux_server.settings import ServerSettings
    from redux_server.storage.opening import open_pictures

    logs.configure(format_="text", level="warning")
    settings = ServerSettings(data_dir=folder)
    blobs = open_pictures(settings)
    blobs.check()
    services = assemble(settings, open_database(settings.database), blobs)
    with _working(services, pipeline) as worker:
        services = replace(services, dispatch=_OneWorker(worker))
        config = uvicorn.Config(
            build_app(services), http=BoundedHttpProtocol, ws="none", loop="asyncio",
            log_config=None, access_log=False, timeout_graceful_shutdown=2,
        )  # fmt: skip
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            try:
                yield (
                    f"http://127.0.0.1:{listener.getsockname()[1]}",
                    services.keys.create("report"),
                )
            finally:
                server.should_exit = True
                thread.join(30)


@contextmanager
def _working(services: Any, pipeline: ReduxPipeline) -> Iterator[Any]:
    """A worker over the services' store, in threads, until the block ends."""
    from redux_server.net.fetch import ImageFetcher
    from redux_server.net.guard import AddressPolicy
    from redux_server.worker.batch import BatchRunner
    from redux_server.worker.inputs import ImageLoader
    from redux_server.worker.loop import Worker

    fetcher = ImageFetcher(AddressPolicy.from_entries(()))
    with ThreadPoolExecutor(1, thread_name_prefix="device") as device:
        runner = BatchRunner(
            images=ImageLoader(services.blobs, services.signer, fetcher),
            pipeline=pipeline,
            safety=NullChecker(),
            blobs=services.blobs,
            device=device,
        )
        worker = Worker("report", store=services.store, runner=runner)
        thread = threading.Thread(target=worker.run, daemon=True)
        thread.start()
        try:
            yield worker
        finally:
            worker.stop()
            thread.join(30)


class _OneWorker:
    """A dispatch whose worker is there already."""

    failure = ""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    async def start(self) -> None:
        """It runs."""

    async def stop(self) -> None:
        """Whoever started it ends it."""

    def wake(self) -> None:
        """Tell it that there is work."""
        self._worker.wake()


def _submit(url: str, key: str, body: Mapping[str, Any]) -> str:
    return str(_call(url + SUBMIT, key, json.dumps(body).encode())["data"]["id"])


def _finish(url: str, key: str, task_id: str) -> str:
    """The state in which the task ended."""
    while True:
        state = str(_call(url + RESULT.format(task_id), key)["data"]["status"])
        if state in ("completed", "failed", "cancelled"):
            return state
        time.sleep(POLL_S)


def _call(url: str, key: str, body: bytes | None = None) -> Any:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, data=body, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback has no proxy
    with opener.open(request, timeout=60) as answer:
        return json.load(answer)


def _data_uri() -> str:
    data = io.BytesIO()
    a_picture().save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
