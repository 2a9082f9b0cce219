"""The table of docs/internals/compatibility.md: what each client was seen to do. Knows no client.

Tests note what they exercise; what became of them is written between two markers of the document.
Nothing is written by a run that was interrupted, in which tests were left out, or none exercised a
client.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

PROPERTY = "exercised"
BEGIN = "<!-- results: written by make test-clients -->"
END = "<!-- end of results -->"
COLUMNS = ("run", "upload", "sync", "bad key", "bad parameter", "dead URL")
MARKS = {"passed": "✓", "failed": "**failed**", "skipped": "skipped"}
WORST_FIRST = ("failed", "skipped", "passed")


@dataclass(frozen=True)
class Exercised:
    """A test's subject: a client, and the case it was put through."""

    client: str
    version: str
    case: str


@dataclass(frozen=True)
class Result:
    """What became of one test: passed, failed or skipped (``reason``)."""

    what: Exercised
    outcome: str
    reason: str = ""


class Recorder:
    """A pytest plugin that writes the table into ``place`` at the end of a whole run."""

    def __init__(self, place: str) -> None:
        self._place = Path(place)
        self._results: dict[str, Result] = {}
        self._is_whole = True

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        left_out = [item for item in items if item.get_closest_marker("clients")]
        self._is_whole = self._is_whole and not left_out

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, what in report.user_properties:
            if name == PROPERTY and isinstance(what, Exercised):
                known = self._results.get(report.nodeid)
                if known is None or known.outcome == "passed":
                    outcome = report.outcome
                    self._results[report.nodeid] = Result(what, outcome, skip_reason(report))

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        ended = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        if self._results and self._is_whole and ended:
            text = self._place.read_text()
            self._place.write_text(with_table(text, table(self._results.values())))


def skip_reason(report: pytest.TestReport) -> str:
    """Why a test was skipped, in the words of the skip."""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return ""


def with_table(text: str, rows: str) -> str:
    """The document with ``rows`` between its markers."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{rows}\n{END}{after}"


def table(results: Iterable[Result]) -> str:
    """One row a client, one column a usual case; all other cases share the last column."""
    clients: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        clients.setdefault((result.what.client, result.what.version), []).append(result)
    head = ["client", "version", *COLUMNS, "also"]
    rows = [head, ["---"] * len(head)]
    rows += [
        [name, version, *(_cell(found, case) for case in COLUMNS), _also(found)]
        for (name, version), found in clients.items()
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(results: list[Result], case: str) -> str:
    """What became of one case; a dash where the client has no such thing."""
    for outcome in WORST_FIRST:
        if any(each.what.case == case and each.outcome == outcome for each in results):
            return MARKS[outcome]
    return "–"


def _also(results: list[Result]) -> str:
    others = dict.fromkeys(each.what.case for each in results if each.what.case not in COLUMNS)
    said = [f"{case} {_cell(results, case)}" for case in others]
    reasons = dict.fromkeys(each.reason for each in results if each.reason)
    return _escape("; ".join([*said, *reasons])) or "–"


def _escape(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", r"\|")
