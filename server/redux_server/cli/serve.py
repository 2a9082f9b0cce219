"""``flux-redux serve``: checks what can be checked early, builds the services, runs uvicorn.

Knows no route and no worker: those are the app's and the dispatch's.
"""

import gc
import signal
import socket
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import uvicorn

from redux_pipelines.loading.load import is_repository_id
from redux_server import logs
from redux_server.api.app import build_app
from redux_server.api.auth import KeyFileError
from redux_server.api.http_server import BoundedHttpProtocol, DrainingServer
from redux_server.api.services import Services, assemble
from redux_server.api.target_uri import TrustedProxies
from redux_server.cli.greeting import Greeting
from redux_server.database.migration import open_database
from redux_server.dispatch.choice import check_dispatch
from redux_server.dispatch.local import worker_devices
from redux_server.net.guard import AddressPolicy
from redux_server.private_files import make_new_files_private, private_folder
from redux_server.settings import ServerSettings, UsageError
from redux_server.storage.blobs import StorageError
from redux_server.storage.buckets import BlobUrlError
from redux_server.storage.opening import local_folder, open_pictures
from redux_server.worker.model import check_parallel, check_warm_up
from redux_weights.layout import find_missing, find_missing_base


def serve(settings: ServerSettings) -> int:
    """Serve until a signal.

    Raises:
        UsageError: what the user has to change first, also where only a worker can find it: that
            its model cannot be loaded.
    """
    logs.configure(format_=settings.log_format, level=settings.log_level)
    make_new_files_private()
    check(settings)
    listener = _listen(settings)
    try:
        private_folder(settings.data_dir)
        services = build_services(settings)
        _refuse_strangers(settings, services)
        greeting = Greeting(settings, services, listener.getsockname()[1])
        greeting.begin()
        config = uvicorn.Config(
            build_app(services),
            log_config=None,
            access_log=False,
            server_header=False,
            http=BoundedHttpProtocol,
            ws="none",
            proxy_headers=False,  # ours reads more of them, see redux_server.api.target_uri
            timeout_keep_alive=settings.keep_alive_s,  # type: ignore[arg-type]  # it only adds it
            timeout_graceful_shutdown=10,
        )
        # uvicorn ends by raising the signal once more, which would kill us before `atexit` runs.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(signal.SIGHUP, lambda *_: sys.exit(0))
        # What start-up made stays; not walking it at each collection halves the p99 of a busy API.
        gc.collect()
        gc.freeze()
        _run(config, services, greeting, listener)
    finally:
        listener.close()
    if failure := services.dispatch.failure:
        raise UsageError(f"the model cannot be loaded: {failure}")
    return 0


def _run(
    config: uvicorn.Config, services: Services, greeting: Greeting, listener: socket.socket
) -> None:
    server = DrainingServer(
        config,
        services.draining,
        lambda: _drain(services),
        must_end=lambda: bool(services.dispatch.failure),
    )
    has_ended = threading.Event()
    greeting.follow(lambda: server.started, has_ended)
    try:
        server.run(sockets=[listener])
    finally:
        has_ended.set()


async def _drain(services: Services) -> None:
    """Let go of those who wait for an end; what is on the devices is finished."""
    services.poller.close()
    await services.dispatch.stop()


def check(settings: ServerSettings) -> None:
    """Find what would stop the server, before anything is started."""
    if settings.redux and not settings.base:
        raise UsageError("--redux needs --base: which FLUX.1 weights it goes with")
    if settings.quality != "exact" and settings.backend != "engine":
        raise UsageError(
            f"--quality {settings.quality} needs --backend engine; "
            f"{settings.backend} has only exact"
        )
    check_warm_up(settings)
    check_parallel(settings)
    worker_devices(settings.device, settings.parallel)
    check_dispatch(settings)
    _check_weights(settings)
    try:
        local_folder(settings.blob_url, settings.blobs_dir)
    except BlobUrlError as error:
        raise UsageError(f"--blob-url {error}") from None
    _check_hosts("--fetch-allow", settings.fetch_allow_entries)
    _check_hosts("--webhook-allow", settings.webhook_allow_entries)
    try:
        TrustedProxies(settings.trusted_proxy_entries)
    except ValueError as error:
        raise UsageError(f"--trusted-proxies: {error}") from None


def _check_weights(settings: ServerSettings) -> None:
    """Folders that are not there, or lack something: loading would find that only later."""
    for flag, given in (("--base", settings.base), ("--redux", settings.redux)):
        if given and not Path(given).expanduser().is_dir() and not is_repository_id(given):
            raise UsageError(
                f"{flag} {given} is no folder here, and no Hub repository (OWNER/NAME); give a "
                "folder in diffusers' layout"
            )
    base, redux = Path(settings.base).expanduser(), Path(settings.redux).expanduser()
    if settings.base and base.is_dir():
        has_redux = settings.redux and redux.is_dir()
        missing = find_missing(base, redux) if has_redux else find_missing_base(base)
        if missing:
            raise UsageError("the weights are incomplete:\n  " + "\n  ".join(missing))


def _check_hosts(flag: str, entries: Iterable[str]) -> None:
    try:
        AddressPolicy.from_entries(entries)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from None


def build_services(settings: ServerSettings) -> Services:
    """What the API process works with, over the data directory of ``settings``."""
    try:
        blobs = open_pictures(settings)
        blobs.check()
    except (BlobUrlError, StorageError) as error:
        raise UsageError(f"--blob-url {error}") from None
    try:
        return assemble(settings, open_database(settings.database), blobs)
    except KeyFileError as error:
        raise UsageError(str(error)) from None


def _listen(settings: ServerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        raise UsageError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; "
            "choose another --port (0 picks a free one) or --host"
        ) from None
    return listener


def _refuse_strangers(settings: ServerSettings, services: Services) -> None:
    if services.keys.is_empty() and not settings.is_loopback:
        raise UsageError(
            f"refusing to listen on {settings.host} while nobody has an API key; "
            f"make one first: flux-redux keys create --name me --data-dir {settings.data_dir}"
        )
