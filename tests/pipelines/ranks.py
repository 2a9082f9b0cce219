"""A small network on several processes, which take turns with other kinds of operators.

Followers import this and no more: neither diffusers nor pytest.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from redux_pipelines.attention.choice import choose
from redux_pipelines.denoising.engine import EngineDenoiser
from redux_pipelines.denoising.parallel import ParallelDenoiser, follow
from redux_pipelines.denoising.sharded import ShardedEngine
from redux_pipelines.fp8.weights import Quantized
from redux_pipelines.loading.flux_weights import fp8_layers, load_flux
from redux_pipelines.network.flux import FluxParams
from redux_pipelines.network.onednn_operators import OneDnnOperators
from redux_pipelines.network.operators import KernelOperators, TorchOperators
from redux_pipelines.parallel.followers import EXIT_SAID, Failed, Followers, Ready
from redux_pipelines.parallel.group import GroupError, connect

COMMAND = (sys.executable, "-P", "-c", "from pipelines.ranks import main; main()")
KINDS = ("torch", "kernels", "onednn", "fp8", "fp8 kernels")
CPU = torch.device("cpu")
_FILE = "network.pt"


@dataclass(frozen=True)
class Setup:
    folder: Path
    rank: int
    devices: Sequence[torch.device]
    timeout_s: float


@dataclass(frozen=True)
class Use:
    kind: str


class _Use(Exception):
    """The root wants another kind."""


class _NoMemoryInTheSecondStep(TorchOperators):
    """Fails in the middle of things, as a device does."""

    steps = 0

    def single_out(self, rows, attend, linear2):
        self.steps += 1
        if self.steps > 3:  # the network has three single blocks
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")
        return super().single_out(rows, attend, linear2)


def save(model, folder):
    """Write diffusers' ``model`` to where all ranks read it."""
    tensors = {name: each.clone() for name, each in model.state_dict().items()}
    torch.save({"config": dict(model.config), "tensors": tensors}, folder / _FILE)


def engine(folder, kind, device=CPU):
    """The engine of that kind, with the saved weights in their dtype."""
    saved = torch.load(folder / _FILE, weights_only=False)
    params, tensors = FluxParams.of(saved["config"]), saved["tensors"]
    dtype = tensors["x_embedder.weight"].dtype
    if kind.startswith("fp8"):
        tensors = Quantized(tensors, fp8_layers(params), device)
    flux = load_flux(params, tensors, device=device, dtype=dtype)
    operators = {
        "kernels": KernelOperators,
        "fp8 kernels": KernelOperators,
        "onednn": OneDnnOperators,
        "broken": _NoMemoryInTheSecondStep,
    }.get(kind, TorchOperators)()
    return EngineDenoiser(flux, choose(device, dtype, params.head_dim).attention, operators)


class Ranks:
    """Rank 0, and processes that are the others."""

    def __init__(self, folder, devices, *, timeout_s=60.0):
        self.folder, self.devices = folder, devices
        setups = {
            f"rank {rank}": Setup(folder, rank, devices, timeout_s)
            for rank in range(1, len(devices))
        }
        self.followers = Followers(COMMAND, setups)
        self.followers.wait_until_ready(120)
        self.group = connect(folder, 0, len(devices), devices[0], timeout_s=timeout_s)

    def denoiser(self, kind="torch", theirs=None):
        """On all ranks; those that follow may have one of another kind."""
        self.followers.send(Use(theirs or kind))
        own = ShardedEngine(engine(self.folder, kind, self.devices[0]), self.group)
        return ParallelDenoiser(own, self.followers)


def main():
    """A process that is not rank 0."""
    commands, answers = (Connection(int(each)) for each in sys.argv[1:3])
    torch.set_num_threads(1)
    try:
        _follow(commands, answers)
    except (EOFError, ConnectionError):
        os._exit(0)
    except BaseException as error:
        answers.send(Failed(str(error), is_cause=not isinstance(error, GroupError)))
        os._exit(EXIT_SAID)


def _follow(commands, answers):
    setup = commands.recv()
    device = setup.devices[setup.rank]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    answers.send(Ready())
    group = connect(setup.folder, setup.rank, len(setup.devices), device, timeout_s=setup.timeout_s)
    kind = commands.recv().kind
    while True:
        try:
            follow(ShardedEngine(engine(setup.folder, kind, device), group), _told_by(commands))
        except _Use as error:
            kind = str(error)


def _told_by(commands):
    def next_told():
        told = commands.recv()
        if isinstance(told, Use):
            raise _Use(told.kind)
        return told

    return next_told
