"""How far a task is, on a terminal and in a file."""

import io
from contextlib import closing

from redux_server.cli.progress import ProgressReport


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar() -> None:
    stream = _Terminal()
    with closing(ProgressReport(stream)) as progress:
        progress.show("queued", detail=", 3 before it")
        progress.show("step", 12, 28)
    assert "queued, 3 before it" in stream.getvalue()
    assert "step 12/28" in stream.getvalue()
    assert "\r" in stream.getvalue()


def test_a_file_gets_lines_now_and_then() -> None:
    stream, now = io.StringIO(), [0.0]
    with closing(ProgressReport(stream, clock=lambda: now[0])) as progress:
        for step in range(1, 29):
            now[0] += 1.0
            progress.show("step", step, 28)
    assert stream.getvalue().splitlines() == ["step 1/28", "step 16/28"]


def test_a_file_gets_no_line_for_each_place_in_the_queue() -> None:
    stream = io.StringIO()
    with closing(ProgressReport(stream, clock=lambda: 100.0)) as progress:
        for position in range(900, 0, -1):
            progress.show("queued", detail=f", {position} before it")
    assert stream.getvalue().splitlines() == ["queued, 900 before it"]
