"""What ``flux-redux doctor`` finds of the model: its files, the safety checker, compiled code.

Downloads, compiles and loads nothing of FLUX: of compiled code that an earlier start kept, only the
first lines are read. Knows no GPU but by its name.
"""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from redux_pipelines.errors import ReduxError
from redux_pipelines.loading import load
from redux_server import __version__
from redux_server.cli.doctor.findings import (
    FLUX_BYTES,
    Finding,
    Level,
    check_space,
    existing,
    gigabytes,
)
from redux_server.cli.serve import check
from redux_server.dispatch.local import devices
from redux_server.settings import ServerSettings, UsageError
from redux_server.worker.model import cache_dir, wants_compile
from redux_weights.embedded import find_mini
from redux_weights.layout import find_missing

_COMPILE, _KEPT = "torch.compile", "compiled code"


def check_model(settings: ServerSettings) -> Iterator[Finding]:
    """Where the model's files are, and whether they are whole."""
    try:
        check(settings)
    except UsageError as error:
        yield Finding(Level.MISSING, "settings", str(error))
        return
    named = {"flux-dev": load.FLUX_DEV, "flux-schnell": load.FLUX_SCHNELL}
    base = settings.base or named.get(settings.model, "")
    if not base:
        yield from _check_embedded(settings.model)
        return
    text = "FLUX.1 [dev], and Redux with any FLUX.1, are for non-commercial use only"
    yield Finding(Level.NOTE, "licence", text)
    redux = settings.redux or load.FLUX_REDUX
    folders = [locate(base, settings.revision), locate(redux, "")]
    for subject, source, folder in zip(("base", "redux"), (base, redux), folders, strict=True):
        if folder is not None:
            yield Finding(Level.OK, subject, f"{source} in {folder}")
        else:
            yield from _check_download(subject, source)
    if folders[0] is not None and folders[1] is not None:
        yield from _check_files(folders[0], folders[1])


def _check_embedded(model: str) -> Iterator[Finding]:
    """The models that come with us."""
    if model == load.MINI:
        try:
            found = find_mini()
        except FileNotFoundError as error:
            yield Finding(Level.MISSING, "model", str(error))
            return
        problems = find_missing(found.base, found.redux)
        yield from (Finding(Level.MISSING, "weights", line) for line in problems)
        if problems:
            return
    yield Finding(Level.OK, "model", f"{model}, which needs no files but ours")


def _check_files(base: Path, redux: Path) -> Iterator[Finding]:
    from huggingface_hub import constants

    for line in find_missing(base, redux):
        if line.startswith(str(constants.HF_HUB_CACHE)) and not constants.HF_HUB_OFFLINE:
            yield Finding(Level.NOTE, "weights", f"{line}; serve fetches it")
        else:
            yield Finding(Level.MISSING, "weights", line)


def locate(source: str, revision: str) -> Path | None:
    """The folder of a checkpoint on this machine: its own, or its place in the hub's cache."""
    from huggingface_hub import snapshot_download

    path = Path(source).expanduser()
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(source, revision=revision or None, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or no name that the hub could know
        return None


def _check_download(subject: str, source: str) -> Iterator[Finding]:
    """Whether a repository that is not here yet can be fetched; does not ask the hub."""
    from huggingface_hub import constants, get_token

    if source.count("/") != 1 or source.startswith((".", "~", "/")):
        text = f"{source} is neither a folder nor the name of a Hugging Face repository"
        yield Finding(Level.MISSING, subject, text)
    elif constants.HF_HUB_OFFLINE:
        text = f"{source} is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to fetch"
        yield Finding(Level.MISSING, subject, text)
    elif get_token() is None:
        text = (
            f"{source} is not here yet, and no HF_TOKEN is set to fetch it; accept the licence at "
            f"https://huggingface.co/{source}, then set HF_TOKEN"
        )
        gated = source.startswith("black-forest-labs/")
        yield Finding(Level.MISSING if gated else Level.NOTE, subject, text)
    else:
        size = gigabytes(FLUX_BYTES)
        text = f"{source} is not here yet; serve fetches it (HF_TOKEN is set; up to {size})"
        yield Finding(Level.NOTE, subject, text)
        yield from check_space("model cache", Path(constants.HF_HUB_CACHE), FLUX_BYTES)


def check_safety_checker(settings: ServerSettings) -> Iterator[Finding]:
    """Its model file, by hash, and that it can be loaded."""
    from redux_pipelines.images.safety import OpenNsfwChecker

    try:
        OpenNsfwChecker(threshold=settings.safety_threshold)
    except (ReduxError, ImportError) as error:
        yield Finding(Level.MISSING, "safety checker", str(error))
    else:
        text = f"OpenNSFW, withholds from a score of {settings.safety_threshold:g}"
        yield Finding(Level.OK, "safety checker", text)


# --- Compiling ------------------------------------------------------------------------------------


def check_compiler(_settings: ServerSettings) -> Iterator[Finding]:
    """What triton and torch.compile need to build code for a GPU."""
    names = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    found = next(filter(None, map(shutil.which, filter(None, names))), None)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if found is None:
        text = "none found: on a GPU, triton and torch.compile need one (apt install gcc)"
        yield Finding(Level.NOTE, "C compiler", text)
    elif not header.exists():
        text = f"{found}, but {header} is not there: triton needs it (apt install python3-dev)"
        yield Finding(Level.NOTE, "C compiler", text)
    else:
        yield Finding(Level.OK, "C compiler", found)


def check_compile(settings: ServerSettings) -> Iterator[Finding]:
    """Whether ``--compile`` can work on each device, and what an earlier start left for it."""
    import torch

    for name in devices(settings.device):
        if name == "cpu" or torch.cuda.is_available():
            yield _check_device(name, settings)
    yield from _check_folder(settings)


def _check_device(device: str, settings: ServerSettings) -> Finding:
    """What lacks is a note: a worker runs on without. Settings that ``serve`` refuses are not."""
    if wants_compile(settings) and settings.backend != "engine":
        text = f"needs --backend engine, and it is {settings.backend}"
        return Finding(Level.MISSING, _COMPILE, text)
    tools, lacking = _tools(device)
    if lacking:
        text = f"not for {device}, and --compile is left out: {'; '.join(lacking)}"
        return Finding(Level.NOTE, _COMPILE, text)
    wish = "it is off" if settings.compile == "off" else f"--compile {settings.compile}"
    text = f"can compile for {device}, with {' and '.join(tools)}; {wish}"
    return Finding(Level.OK, _COMPILE, text)


def _tools(device: str) -> tuple[list[str], list[str]]:
    """What torch.compile uses for a device, and what of that is not there.

    Its C++ compiler is ``$CXX``, or g++ if that is unset; a GPU's code is triton's as well.
    """
    tools, lacking = [], []
    compiler = os.environ.get("CXX") or "g++"
    if (found := shutil.which(compiler)) is None:
        lacking.append(f"the C++ compiler {compiler} is not there (apt install g++)")
    else:
        tools.append(found)
    if device != "cpu":
        try:
            tools.append(f"triton {version('triton')}")
        except PackageNotFoundError:
            lacking.append("triton is not installed (it comes with a CUDA build of torch)")
    return tools, lacking


def _check_folder(settings: ServerSettings) -> Iterator[Finding]:
    folder = cache_dir()
    if folder is None:
        text = "this user has no home directory, so nothing is kept; set XDG_CACHE_HOME"
        yield Finding(Level.NOTE, _KEPT, text)
        return
    place = existing(folder)
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        text = f"{place} cannot be written by this user, so every start compiles anew"
        yield Finding(Level.NOTE, _KEPT, text)
    else:
        yield Finding(Level.OK, _KEPT, _describe_kept(folder, settings))


def _describe_kept(folder: Path, settings: ServerSettings) -> str:
    """What of the code kept in ``folder`` is for the devices, torch and version that are here."""
    import torch

    from redux_pipelines.compilation.cache import kept_code, machine_facts

    kept = list(kept_code(folder))
    if not kept:
        return f"none in {folder} yet: the first start compiles (or `flux-redux warmup`)"
    usable = []
    for name in devices(settings.device):
        if name == "cpu" or torch.cuda.is_available():
            here = {**machine_facts(torch.device(name)), "version": __version__}
            usable += [each for each in kept if here.items() <= each.facts.items()]
    modes = sorted({each.facts.get("mode", "?") for each in usable})
    size = sum({each.path: each.size_bytes for each in usable}.values())
    total = f"code of {len(kept)} network(s) in {folder}"
    if not usable:
        return f"{total}, none of them for this machine, torch and version"
    count = len({each.path for each in usable})
    return (
        f"{total}; {count} of {size / 1e6:.1f} MB for this machine, torch and version "
        f"({', '.join(modes)})"
    )
