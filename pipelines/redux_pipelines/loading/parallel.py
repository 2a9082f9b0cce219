"""One checkpoint on several devices, each with a process of its own; we are the first.

Every process has the whole transformer on its device; the other parts of the model are ours alone.
Knows no network.
"""

import dataclasses
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from redux_pipelines.contract.types import LoadOptions
from redux_pipelines.denoising.engine import EngineDenoiser
from redux_pipelines.denoising.parallel import ParallelDenoiser
from redux_pipelines.denoising.sharded import ShardedEngine, check_heads
from redux_pipelines.devices import resolve_device
from redux_pipelines.loading.components import load_components
from redux_pipelines.loading.follower import Connect, Setup
from redux_pipelines.parallel.followers import Followers
from redux_pipelines.parallel.group import ROOT, connect
from redux_pipelines.pipeline import Components

logger = logging.getLogger(__name__)

LOAD_S = 1800.0
"""How long the others may take to load, from when we have."""

EXCHANGE_S = 120.0
"""How long ranks may wait for each other. A step takes seconds, or a minute on a slow CPU."""

_FOLLOW = "from redux_pipelines.loading.follower import main; main()"
_FOLLOWER = (sys.executable, "-P", "-c", _FOLLOW)


def load_on_several(base: Path, redux: Path, options: LoadOptions) -> Components:
    """``load_components``, for as many devices as ``options.parallel`` says.

    Raises besides ``ValueError`` for too few devices, or heads that cannot be shared out among
    them, and ``DeviceError`` where another process fails.
    """
    devices = ranks_of(options.device, options.parallel)
    options = dataclasses.replace(options, memory="resident")
    folder = Path(tempfile.mkdtemp(prefix="redux-ranks-"))  # for our user alone
    setup = Setup(base, redux, options, folder, EXCHANGE_S)
    with _started(devices, setup) as followers:
        components = load_components(base, redux, setup.of(ROOT, devices).options)
        engine = components.denoiser
        assert isinstance(engine, EngineDenoiser)
        check_heads(engine.flux.params.num_heads, options.parallel)
        followers.wait_until_ready(LOAD_S)
        followers.send(Connect())
        group = connect(folder, ROOT, options.parallel, devices[ROOT], timeout_s=EXCHANGE_S)
        denoiser = ParallelDenoiser(ShardedEngine(engine, group), followers)
    logger.info("one image on %s", ", ".join(map(str, devices)))
    return dataclasses.replace(components, denoiser=denoiser, parallel=options.parallel)


@contextmanager
def _started(devices: tuple[torch.device, ...], setup: Setup) -> Iterator[Followers]:
    """The processes of all devices but ours, which end if we do not get to the end."""
    setups = {
        f"rank {rank} on {devices[rank]}": setup.of(rank, devices)
        for rank in range(1, len(devices))
    }
    remove = partial(shutil.rmtree, setup.folder, ignore_errors=True)
    followers = Followers(_FOLLOWER, setups, at_end=remove)
    try:
        yield followers
    except BaseException:
        followers.close()
        raise


def ranks_of(device: str, parallel: int) -> tuple[torch.device, ...]:
    """The devices of ``parallel`` ranks: those of a list, or ``device`` and those that follow it.

    ``auto`` and ``cuda`` are the current one and those after it. Raises ``ValueError`` for too few.
    """
    names = device.split(",")
    first = resolve_device(names[0])
    if first.type == "cpu":
        if device == "auto":
            raise ValueError(
                f"parallel={parallel} needs {parallel} GPUs, and torch sees none: use "
                "device='cpu' to try it out in processes on the CPU"
            )
        return (first,) * parallel
    if len(names) == 1:
        start = first.index or 0
        names = [f"cuda:{start + rank}" for rank in range(parallel)]
    if len(set(names)) != parallel:
        raise ValueError(
            f"parallel={parallel} needs one GPU, or {parallel} different ones, got {device!r}"
        )
    found, missing = torch.cuda.device_count(), [n for n in names if not _is_there(n)]
    if missing:
        raise ValueError(
            f"parallel={parallel} from {device!r} on needs {', '.join(names)}, and torch sees "
            f"{found} GPUs: use fewer, or another device"
        )
    return tuple(map(torch.device, names))


def _is_there(name: str) -> bool:
    return (torch.device(name).index or 0) < torch.cuda.device_count()
