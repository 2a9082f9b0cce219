"""What a verb says on standard error while it works: sentences, and how far a task is.

Knows no task and no server, only text and numbers. Loads tqdm when it draws.
"""

import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

_LINE_EVERY_S = 15.0


def note(text: str) -> None:
    """Tell the user something on standard error."""
    print(f"flux-redux: {text}", file=sys.stderr, flush=True)


class ProgressReport:
    """Says on a stream how far a task is: a bar on a terminal, elsewhere now and then a line."""

    def __init__(
        self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._bar: Any = None
        self._state = ""
        self._said_at = 0.0

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def show(self, state: str, step: int = 0, total_steps: int = 0, *, detail: str = "") -> None:
        """Show ``state`` (such as "queued") and, where there are steps, how many are done.

        A ``detail`` is shown after the state; another detail is not another state.
        """
        if self._stream.isatty():
            self._draw(state + detail, step, total_steps)
        else:
            self._say(state, detail, step, total_steps)

    def _draw(self, state: str, step: int, total_steps: int) -> None:
        if self._bar is None or bool(self._bar.total) != bool(total_steps):
            from tqdm import tqdm

            self.close()
            size = shutil.get_terminal_size()  # never 0, as a new pseudo-terminal's own may be
            shape = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}"
            self._bar = tqdm(
                desc=state,
                initial=step,
                total=total_steps or None,
                bar_format=shape if total_steps else "{desc} {elapsed}",
                file=self._stream,
                leave=False,
                ncols=size.columns,
                nrows=size.lines,
            )
        self._bar.set_description_str(state, refresh=False)
        self._bar.n = step
        self._bar.refresh()

    def _say(self, state: str, detail: str, step: int, total_steps: int) -> None:
        now = self._clock()
        if state == self._state and now - self._said_at < _LINE_EVERY_S:
            return
        self._state, self._said_at = state, now
        text = f"{state} {step}/{total_steps}" if total_steps else state + detail
        print(text, file=self._stream, flush=True)
