"""The process of one device that follows another: loads its transformer, then does as it is told.

``main`` is started with the numbers of two open pipes, for commands and for answers. Its only end
is that of the first, which comes with that of the process it follows, or a failure, of which it
tells over the second. Torch is imported only when such an end would be noticed.
"""

import logging
import os
import queue
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redux_pipelines.contract.types import LoadOptions
from redux_pipelines.parallel.followers import EXIT_SAID, Failed, Logged, Ready

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Setup:
    """What a follower loads, and how it finds the others: in ``folder``.

    ``options`` are those of its own device; of a CPU's threads it may use ``threads``.
    """

    base: Path
    redux: Path
    options: LoadOptions
    folder: Path
    exchange_s: float
    rank: int = 0
    threads: int = 0

    def of(self, rank: int, devices: "tuple[torch.device, ...]") -> "Setup":
        """That of ``rank``; on a CPU all share its threads."""
        import torch

        return replace(
            self,
            options=replace(self.options, device=str(devices[rank]), parallel=len(devices)),
            rank=rank,
            threads=max(1, torch.get_num_threads() // len(devices)),
        )


@dataclass(frozen=True, slots=True)
class Connect:
    """All have loaded: meet the others."""


def main() -> None:
    """Load, meet, follow; never returns."""
    # Those are for the process that we follow.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    commands, answers = (Connection(int(each)) for each in sys.argv[1:3])
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    setup = commands.recv()
    threading.Thread(target=_listen, args=(commands, told.put, setup.folder), daemon=True).start()
    logging.getLogger().addHandler(_Forward(answers))
    try:
        _follow(setup, told.get, answers)
    except BaseException as error:
        _say(answers, error)
    os._exit(EXIT_SAID)


def _listen(commands: Connection, put: Callable[[Any], None], folder: Path) -> None:
    """Pass on what is told; end the process, whatever it does, when there is nobody to follow."""
    try:
        while True:
            put(commands.recv())
    except (EOFError, OSError):
        shutil.rmtree(folder, ignore_errors=True)  # a process that was killed could not
        os._exit(0)


def _follow(setup: Setup, next_told: Callable[[], Any], answers: Connection) -> None:
    import torch

    from redux_pipelines.denoising.parallel import follow
    from redux_pipelines.denoising.sharded import ShardedEngine
    from redux_pipelines.loading.components import load_engine
    from redux_pipelines.parallel.group import connect

    device = torch.device(setup.options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(setup.threads)
    engine = load_engine(setup.base, setup.redux, setup.options)
    answers.send(Ready())
    assert isinstance(next_told(), Connect)
    ranks = setup.options.parallel
    group = connect(setup.folder, setup.rank, ranks, device, timeout_s=setup.exchange_s)
    follow(ShardedEngine(engine, group), next_told)


def _say(answers: Connection, error: BaseException) -> None:
    """Why we end, for whoever reads the log and for the process that we follow."""
    from redux_pipelines.parallel.group import GroupError

    is_cause = not isinstance(error, GroupError)
    if is_cause:
        logging.getLogger(__name__).error("a rank failed", exc_info=error)
    text = str(error).strip().split("\n", 1)[0] or type(error).__name__
    answers.send(Failed(text, is_cause))


class _Forward(logging.Handler):
    """Warnings and worse go to the log of the process that we follow."""

    def __init__(self, answers: Connection) -> None:
        super().__init__(logging.WARNING)
        self._answers = answers

    def emit(self, record: logging.LogRecord) -> None:
        """One record, with its traceback if it has one, as text."""
        try:
            self._answers.send(Logged(record.name, record.levelno, self.format(record)))
        except OSError:
            self.handleError(record)
