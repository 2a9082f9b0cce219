"""``flux-redux doctor``: what this machine has, and what ``serve`` would lack on it.

Looks only: downloads, creates and repairs nothing. Each check stands alone, and one that breaks
becomes a line of the report.
"""

import errno
import os
import platform
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path

import httpx

from redux_pipelines.errors import ReduxError
from redux_server import __version__
from redux_server.attention_check import check_attention, dtype_name
from redux_server.auth import KeyFileError, KeyRing, read_keys_file
from redux_server.blob_findings import check_floor, check_pictures
from redux_server.cluster_findings import check_cluster
from redux_server.compile_findings import check_compile, check_compiler
from redux_server.database import DatabaseUnusable, open_database
from redux_server.findings import Finding, Level, check_space, existing, gigabytes
from redux_server.fp8_findings import check_fp8
from redux_server.memory_findings import check_card, check_memory
from redux_server.settings import ServerSettings
from redux_server.weights_check import check_model

_PACKAGES = ("torch", "diffusers", "transformers", "onnxruntime", "sqlalchemy", "fastapi")
NETWORK_FILESYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "beegfs"}
    | {"fuse.sshfs", "fuse.s3fs"}
)
_LITTLE_SPACE_BYTES = 2 * 2**30


Check = Callable[[ServerSettings], Iterator[Finding]]


def doctor(settings: ServerSettings, *, gpu_memory_gb: float = 0.0) -> int:
    """Print the report; 1 when something is missing that ``serve`` needs.

    ``gpu_memory_gb``, unless 0: say also what a card sold with so many GB would hold.
    """
    findings = [finding for examine in CHECKS for finding in _examine(examine, settings)]
    if gpu_memory_gb:
        findings += check_card(settings, gpu_memory_gb)
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        text = finding.text.replace("\n", "\n" + " " * (width + 11))
        print(f"{finding.level:<7}  {finding.subject:<{width}}  {text}")
    missing = sum(finding.level is Level.MISSING for finding in findings)
    print(
        f"\n{missing} missing" if missing else "\nNothing is missing: `flux-redux serve` can run."
    )
    return 1 if missing else 0


def _examine(examine: Check, settings: ServerSettings) -> Iterator[Finding]:
    subject = examine.__name__.removeprefix("check_").replace("_", " ")
    try:
        yield from examine(settings)
    except Exception as error:
        yield Finding(Level.NOTE, subject, f"cannot be examined: {type(error).__name__}: {error}")


def check_python(_settings: ServerSettings) -> Iterator[Finding]:
    """Interpreter, operating system and our own version."""
    yield Finding(Level.OK, "flux-redux", __version__)
    yield Finding(Level.OK, "python", f"{platform.python_version()} on {platform.platform()}")


def check_packages(_settings: ServerSettings) -> Iterator[Finding]:
    """Versions of what we stand on, without importing it."""
    for name in _PACKAGES:
        try:
            yield Finding(Level.OK, name, package_version(name))
        except PackageNotFoundError:
            yield Finding(
                Level.MISSING, name, "not installed; run `pip install flux-redux-server` again"
            )
    try:
        yield Finding(Level.OK, "triton", package_version("triton"))
    except PackageNotFoundError:
        yield Finding(Level.NOTE, "triton", "not installed: plain torch is used, slower on a GPU")


def check_gpu(settings: ServerSettings) -> Iterator[Finding]:
    """The GPUs torch can use, and whether they are those that ``--device`` asks for."""
    import torch

    from redux_server.engine import devices

    wanted = devices(settings.device)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(count):
        yield Finding(Level.OK, f"cuda:{i}", _describe_gpu(i))
    if count:
        yield Finding(Level.OK, "driver", _driver_version())
    lacking = [name for name in wanted if name != "cpu" and _index(name) >= count]
    if lacking:
        yield Finding(
            Level.MISSING,
            "gpu",
            f"torch {torch.__version__} cannot use {', '.join(lacking)}; install a CUDA build of "
            "torch and a driver that fits it, or choose --device cpu",
        )
    elif wanted == ["cpu"]:
        yield Finding(Level.NOTE, "gpu", "none is used: FLUX.1 takes minutes for an image")
    dtype = dtype_name(settings, wanted)
    yield Finding(
        Level.OK, "would run", f"{settings.backend} backend, {dtype} on {', '.join(wanted)}"
    )
    if not lacking:
        yield from _slow_dtype(dtype, wanted)


def _describe_gpu(index: int) -> str:
    import torch

    properties = torch.cuda.get_device_properties(index)
    text = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    return f"{text}, {gigabytes(properties.total_memory)}"


def _slow_dtype(dtype: str, wanted: list[str]) -> Iterator[Finding]:
    import torch

    from redux_pipelines.precision import slow_reason

    for name in wanted:
        device = torch.device("cpu" if name == "cpu" else f"cuda:{_index(name)}")
        if (reason := slow_reason(device, getattr(torch, dtype))) is not None:
            yield Finding(Level.NOTE, "dtype", reason)


def _index(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def _driver_version() -> str:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0].strip() if path.exists() else "unknown version"


def check_safety_checker(settings: ServerSettings) -> Iterator[Finding]:
    """Its model file, by hash, and that it can be loaded."""
    from redux_pipelines.safety import OpenNsfwChecker

    try:
        OpenNsfwChecker(threshold=settings.safety_threshold)
    except (ReduxError, ImportError) as error:
        yield Finding(Level.MISSING, "safety checker", str(error))
    else:
        text = f"OpenNSFW, withholds from a score of {settings.safety_threshold:g}"
        yield Finding(Level.OK, "safety checker", text)


def check_data_dir(settings: ServerSettings) -> Iterator[Finding]:
    """Whether tasks and images can be kept there: rights, file system, space."""
    folder = settings.data_dir
    place = existing(folder)
    if not place.is_dir():
        yield Finding(Level.MISSING, "data dir", f"{place} is a file; choose another --data-dir")
        return
    if not os.access(place, os.W_OK | os.X_OK):
        text = f"{place} cannot be written by this user; choose another --data-dir"
        yield Finding(Level.MISSING, "data dir", text)
        return
    is_new = "" if place == folder else " (serve will create it)"
    kind = filesystem_of(place)
    yield Finding(Level.OK, "data dir", f"{folder}{is_new}, on {kind}")
    if kind in NETWORK_FILESYSTEMS:
        text = f"{kind} is a network file system, where SQLite's locks fail; use a local disk"
        yield Finding(Level.NOTE, "data dir", text)
    yield from check_space("disk space", folder, _LITTLE_SPACE_BYTES)
    yield from check_floor(settings, shutil.disk_usage(place).free)


def filesystem_of(path: Path, *, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the file system that holds ``path``, such as ``ext4``; proc(5) has the format."""
    target = path.resolve()
    best, kind = -1, "an unknown file system"
    for line in mounts.read_text().splitlines():
        left, _, right = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), left.split()[4]))
        if target.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), right.split()[0]
    return kind


def check_port(settings: ServerSettings) -> Iterator[Finding]:
    """Whether ``serve`` could listen where it is told to."""
    place = f"{settings.host}:{settings.port}"
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE and _is_ours(settings):
                text = f"a FLUX Redux Server is running on {place} already"
                yield Finding(Level.NOTE, "port", text)
            else:
                text = f"cannot listen on {place} ({error.strerror}); choose another --port"
                yield Finding(Level.MISSING, "port", text)
        else:
            yield Finding(Level.OK, "port", f"{place} is free")


def _is_ours(settings: ServerSettings) -> bool:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        answer = httpx.get(f"http://{host}:{settings.port}/version", timeout=2.0, trust_env=False)
        return {"version", "model"} <= set(answer.json())
    except (httpx.HTTPError, ValueError, TypeError):
        return False


def check_api_keys(settings: ServerSettings) -> Iterator[Finding]:
    """Whether anybody could use the server."""
    count = 0
    if settings.api_keys_file:
        try:
            count = len(read_keys_file(Path(settings.api_keys_file)))
        except KeyFileError as error:
            yield Finding(Level.MISSING, "API keys", str(error))
            return
    if settings.database_url or (settings.data_dir / "tasks.db").exists():
        try:
            database = open_database(settings.database)
        except DatabaseUnusable:
            yield Finding(Level.NOTE, "API keys", "cannot be counted: see the database")
            return
        count += sum(not key.revoked_at for key in KeyRing(database).list())
        database.dispose()
    if count:
        yield Finding(Level.OK, "API keys", f"{count} valid")
    elif settings.is_loopback:
        yield Finding(Level.NOTE, "API keys", "none yet: serve makes the first and shows it")
    else:
        text = (
            f"none, so serve refuses to listen on {settings.host}; make one: "
            f"flux-redux keys create --name me --data-dir {settings.data_dir}"
        )
        yield Finding(Level.MISSING, "API keys", text)


CHECKS: tuple[Check, ...] = (
    check_python,
    check_packages,
    check_gpu,
    check_memory,
    check_attention,
    check_fp8,
    check_compiler,
    check_compile,
    check_model,
    check_safety_checker,
    check_data_dir,
    check_pictures,
    check_cluster,
    check_port,
    check_api_keys,
)
