"""The part of ``flux-redux doctor`` that tells what can be compiled here, and what is kept of it.

Compiles nothing and loads nothing of what is kept: only the first lines of files are read.
"""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from redux_server import __version__
from redux_server.compile_plan import cache_dir, wants_compile
from redux_server.findings import Finding, Level, existing
from redux_server.settings import ServerSettings

_COMPILE, _KEPT = "torch.compile", "compiled code"


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

    from redux_server.engine import devices

    for name in devices(settings.device):
        if name == "cpu" or torch.cuda.is_available():
            yield _judge(name, settings)
    yield from _check_folder(settings)


def _judge(device: str, settings: ServerSettings) -> Finding:
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
        yield Finding(Level.OK, _KEPT, _held(folder, settings))


def _held(folder: Path, settings: ServerSettings) -> str:
    """What of the files in ``folder`` is for the devices, torch and version that are here."""
    import torch

    from redux_pipelines.compile_cache import kept_files, machine_facts
    from redux_server.engine import devices

    files = list(kept_files(folder))
    if not files:
        return f"none in {folder} yet: the first start compiles (or `flux-redux warmup`)"
    usable = []
    for name in devices(settings.device):
        if name == "cpu" or torch.cuda.is_available():
            here = {**machine_facts(torch.device(name)), "version": __version__}
            usable += [file for file in files if here.items() <= file.facts.items()]
    modes = sorted({file.facts.get("mode", "?") for file in usable})
    size = sum({file.path: file.size_bytes for file in usable}.values())
    total = f"{len(files)} file(s) in {folder}"
    if not usable:
        return f"{total}, none of them for this machine, torch and version"
    count = len({file.path for file in usable})
    return (
        f"{total}; {count} of {size / 1e6:.1f} MB for this machine, torch and version "
        f"({', '.join(modes)})"
    )
