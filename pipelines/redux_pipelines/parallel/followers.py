"""Processes that work beside ours: started, told what to do, watched.

A follower gets commands over one pipe and answers over another. It ends when the first is closed,
however our process ends; when one of them ends, we know by the second. Knows no tensors and no
model: what is said over the pipes is for ``denoising.parallel``.
"""

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from typing import Any

from redux_pipelines.errors import DeviceError

EXIT_SAID = 3
"""The exit code of a follower that said why it ends."""

_END_S = 5.0  # for a follower whose pipe was closed; then it is killed
_REASON_S = 1.0  # from what a failure looks like to us to what the failed one says of it


@dataclass(frozen=True, slots=True)
class Ready:
    """A follower has loaded its model."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A follower ends, and why. ``is_cause``: no other rank's end was the reason."""

    reason: str
    is_cause: bool


@dataclass(frozen=True, slots=True)
class Logged:
    """A line for the log of our process."""

    logger: str
    level: int
    text: str


@dataclass(slots=True)
class _State:
    """What is known of all followers; shared with the threads that watch them."""

    ready: int = 0
    causes: list[str] = field(default_factory=list)
    effects: list[str] = field(default_factory=list)
    is_closing: bool = False
    on_failure: Callable[[], None] = lambda: None
    changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def failure(self) -> str | None:
        return next(iter([*self.causes, *self.effects]), None)

    def fail(self, reason: str, *, is_cause: bool) -> None:
        with self.changed:
            if self.is_closing:
                return
            (self.causes if is_cause else self.effects).append(reason)
            self.changed.notify_all()
        self.on_failure()


@dataclass(frozen=True, slots=True)
class _Follower:
    name: str
    process: "subprocess.Popen[bytes]"
    commands: Connection
    answers: Connection


class Followers:
    """One process for each of ``setups``, by name, which is the first thing that it is told.

    ``command`` starts one; the numbers of its two pipes are added to it. ``at_end`` is called when
    all have ended. All methods but ``lose`` and ``close`` raise ``DeviceError`` once one of them
    failed: then none can be used any more.
    """

    def __init__(
        self,
        command: Sequence[str],
        setups: Mapping[str, Any],
        *,
        at_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._state = _State()
        self._followers: list[_Follower] = []
        self._end = weakref.finalize(self, _end, self._followers, self._state, at_end)
        for name, setup in setups.items():
            follower = _start(command, name)
            self._followers.append(follower)
            threading.Thread(
                target=_watch, args=(follower, self._state), name=name, daemon=True
            ).start()
            self._tell(follower, setup)

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes, in their order."""
        return tuple(each.process.pid for each in self._followers)

    def wait_until_ready(self, timeout_s: float) -> None:
        """Return when all have loaded; ``DeviceError`` also if that takes too long."""
        state = self._state
        with state.changed:
            state.changed.wait_for(
                lambda: state.failure is not None or state.ready == len(self._followers), timeout_s
            )
        self.check()
        if state.ready < len(self._followers):
            raise DeviceError(self.lose(f"not all ranks have loaded within {timeout_s:.0f} s"))

    def send(self, command: Any) -> None:
        """Tell ``command`` to each of them."""
        self.check()
        for follower in self._followers:
            self._tell(follower, command)

    def check(self) -> None:
        """Raise ``DeviceError`` if one of them failed."""
        if self._state.failure is not None:
            raise DeviceError(self.lose(self._state.failure, is_cause=False))

    def on_failure(self, action: Callable[[], None]) -> None:
        """Call ``action`` from another thread as soon as one of them fails."""
        self._state.on_failure = action

    def lose(self, reason: str, *, is_cause: bool = True) -> str:
        """End them all, as they are out of step; why, where ``reason`` may be but an effect."""
        state = self._state
        state.fail(reason, is_cause=is_cause)
        with state.changed:
            state.changed.wait_for(lambda: state.causes, 0.0 if state.causes else _REASON_S)
        found = state.failure or reason
        for follower in self._followers:
            follower.process.kill()
        self.close()
        return found

    def close(self) -> None:
        """End them, and wait for that."""
        self._end()

    def _tell(self, follower: _Follower, command: Any) -> None:
        try:
            follower.commands.send(command)
        except OSError as error:
            raise DeviceError(
                self.lose(f"{follower.name} cannot be reached: {error}", is_cause=False)
            ) from error


def _start(command: Sequence[str], name: str) -> _Follower:
    """Start one, which imports what we would; what it prints goes where errors do."""
    theirs, commands = Pipe(duplex=False)
    answers, their_answers = Pipe(duplex=False)
    handed = (theirs.fileno(), their_answers.fileno())
    with theirs, their_answers:
        process = subprocess.Popen(
            [*command, *map(str, handed)],
            stdin=subprocess.DEVNULL,
            stdout=2,  # a result of ours may go to standard output
            pass_fds=handed,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    return _Follower(name, process, commands, answers)


def _watch(follower: _Follower, state: _State) -> None:
    """Take in what a follower says, until it ends."""
    with contextlib.suppress(EOFError, OSError), follower.answers:
        while True:
            _take_in(follower.answers.recv(), follower.name, state)
    code = follower.process.wait()
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    state.fail(f"{follower.name} {how}", is_cause=code != EXIT_SAID)


def _take_in(answer: Any, name: str, state: _State) -> None:
    match answer:
        case Ready():
            with state.changed:
                state.ready += 1
                state.changed.notify_all()
        case Failed():
            state.fail(f"{name} failed: {answer.reason}", is_cause=answer.is_cause)
        case Logged():
            logging.getLogger(answer.logger).log(answer.level, "%s: %s", name, answer.text)


def _end(followers: Sequence[_Follower], state: _State, at_end: Callable[[], None]) -> None:
    """Close their pipes; kill those that do not end by that."""
    with state.changed:
        state.is_closing = True
    for follower in followers:
        follower.commands.close()
    ends_at = time.monotonic() + _END_S
    for follower in followers:
        try:
            follower.process.wait(max(0.0, ends_at - time.monotonic()))
        except subprocess.TimeoutExpired:
            follower.process.kill()
            follower.process.wait()
    at_end()
