"""Runs stages one after the other within a budget, whatever becomes of each.

A stage that raises, runs out of its time or of the device's memory leaves its reason, and the next
one begins. A stage that no longer fits into the budget is left out. After an error that spoils the
process for its device nothing more can run in it: the caller starts another (``DeviceLost``). So
does a thread (``on_hang``) if a stage does not even end when told to. Knows no stage.
"""

import gc
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from gpu_report.report import Report
from redux_pipelines.devices import is_final, is_out_of_memory

REASON_LENGTH = 1500
AGAIN_S = 10.0
"""After which a stage that went on beyond its time is told once more."""
HANGS_S = 30.0
"""Beyond its time, after which a stage hangs where no signal reaches it: on its device."""
Section = dict[str, Any]


class NotRun(Exception):
    """A stage, or a part of one, has nothing to measure here; the text says why."""


class OutOfTime(BaseException):
    """A stage took longer than it may; no handler of ``Exception`` keeps it."""


class DeviceLost(Exception):
    """The process cannot use its device any more."""


@dataclass(frozen=True)
class Stage:
    """Something to measure: ``run`` fills its section.

    ``need_s`` is what it should take on an H100, ``limit_s`` what it may take.
    """

    name: str
    run: Callable[[Section], None]
    need_s: float
    limit_s: float


class Runner:
    """Runs stages into ``report`` until ``budget_s`` after ``started`` (Unix seconds).

    ``on_hang`` is called by another thread, once the report is saved, and must end the process.
    """

    def __init__(
        self,
        report: Report,
        *,
        started: float,
        budget_s: float,
        on_hang: Callable[[], object],
        hangs_s: float = HANGS_S,
    ) -> None:
        self._report = report
        self._started = started
        self._budget_s = budget_s
        self._on_hang = on_hang
        self._hangs_s = hangs_s

    @property
    def elapsed_s(self) -> float:
        """Since the start, imports included."""
        return time.time() - self._started

    def run(self, stages: Sequence[Stage]) -> None:
        """Run those that were not run before. Raises ``DeviceLost``."""
        for stage in stages:
            if not self._report.is_done(stage.name):
                try:
                    self._run(stage)
                finally:
                    self._save()

    def say(self, text: str) -> None:
        """A line with the time, at once."""
        print(f"[{self.elapsed_s:6.1f} s] {text}", flush=True)

    def _run(self, stage: Stage) -> None:
        left_s = self._budget_s - self.elapsed_s
        if left_s < stage.need_s:
            reason = f"no time left: needs about {stage.need_s:.0f} s, {max(left_s, 0):.0f} s left"
            self._report.content["failures"][stage.name] = reason
            self.say(f"{stage.name}: {reason}")
            return
        self.say(f"{stage.name} ...")
        section, began = self._report.section(stage.name), time.perf_counter()
        limit_s = min(stage.limit_s, max(left_s, 1.0))
        watch = threading.Timer(limit_s + self._hangs_s, self._give_up, [stage.name])
        watch.daemon = True
        watch.start()
        try:
            with limited(limit_s):
                stage.run(section)
        except NotRun as reason:
            section["not_run"] = str(reason)
            self.say(f"{stage.name}: not run: {reason}")
        except (Exception, OutOfTime) as error:
            self._fail(stage, error)
            if is_final(error):
                raise DeviceLost(str(error)) from error
        finally:
            watch.cancel()
            taken_s = time.perf_counter() - began
            self._report.content["stages_s"][stage.name] = round(taken_s, 2)
            free_memory()
        if "not_run" not in section and stage.name not in self._report.content["failures"]:
            self.say(f"{stage.name}: done in {taken_s:.1f} s")

    def _fail(self, stage: Stage, error: BaseException) -> None:
        kind = "out of memory: " if is_out_of_memory(error) else ""
        text = "".join(traceback.format_exception(error))
        self._report.content["failures"][stage.name] = kind + text[-REASON_LENGTH:]
        self.say(f"{stage.name}: FAILED: {type(error).__name__}: {str(error)[:300]}")

    def _give_up(self, name: str) -> None:
        self.say(f"{name}: hangs")
        self._report.content["failures"][name] = "hangs: did not end when it was told to"
        self._save()
        signal.setitimer(signal.ITIMER_REAL, 0)  # would outlive even an exec
        self._on_hang()

    def _save(self) -> None:
        """What a full disk does not take is in the table at the end."""
        self._report.content["total_s"] = round(self.elapsed_s, 1)
        try:
            self._report.save()
        except OSError as error:
            self.say(f"the report cannot be written: {error}")


def free_memory() -> None:
    """Give back what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # of a device that is lost
            torch.cuda.empty_cache()


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise ``OutOfTime`` in the block once it has taken so long; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)  # again: a destructor may swallow it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
