"""One run from its plan to its files. Ctrl-C ends the measuring, not the report."""

import asyncio
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from redux_server.bench.measure import Runner, Shown
from redux_server.bench.plan import Plan
from redux_server.bench.quality import Assessment, Encoder
from redux_server.bench.report import Folder, environment
from redux_server.bench.summary import summarise
from redux_server.bench.target import Target
from redux_server.bench.transport import HttpTransport, Transport

INTERRUPTED = 130

Connect = Callable[[Target], Transport]


def http(target: Target) -> Transport:
    """Over the network; needs a running loop."""
    return HttpTransport(is_local=target.is_local)


async def measure(
    plan: Plan,
    keys: Mapping[str, str],
    folder: Folder,
    *,
    show: Shown = lambda *_: None,
    connect: Connect = http,
) -> Runner:
    """Carry out a plan; cancelled, it returns what was seen until then.

    Raises:
        Unusable: a target that cannot be measured; nothing was asked of any.
    """
    transports = {target.name: connect(target) for target in plan.targets}
    try:
        runner = Runner(plan, keys, transports, save=folder.save, record=folder.record, show=show)
        await runner.ask()
        measuring = asyncio.ensure_future(runner.measure())
        with _stopped_by_signals(measuring), suppress(asyncio.CancelledError):
            await measuring
        return runner
    finally:
        for transport in transports.values():
            await transport.close()


def report(
    plan: Plan,
    runner: Runner,
    folder: Folder,
    *,
    command: str,
    encoder: Encoder | None,
    show: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Look at the images and write the files; returns what ``report.json`` says.

    Raises:
        OSError: a file that cannot be written.
    """
    measurement = runner.measurement
    assessment = Assessment(plan.workload, plan.targets, Path(folder.path), encoder)
    quality = assessment.assess(measurement.samples, show)
    told = {
        "made_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "environment": environment(runner.idempotency),
        **summarise(plan, measurement, quality),
    }
    folder.write(told, plan, measurement)
    return told


@contextmanager
def _stopped_by_signals(measuring: "asyncio.Future[None]") -> Iterator[None]:
    """A first SIGINT or SIGTERM ends the measuring; a second one acts as ever."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def stop() -> None:
        measuring.cancel()
        for each in signals:
            loop.remove_signal_handler(each)

    try:
        for each in signals:
            loop.add_signal_handler(each, stop)
    except (NotImplementedError, RuntimeError, ValueError):  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        for each in signals:
            loop.remove_signal_handler(each)
