"""Adds to the summary what became of the files of each format."""

from collections import Counter, defaultdict

import pytest

from pictures.check import AGREES, ALLOWED, REFUSED, RIGHT

_COLUMNS = (RIGHT, REFUSED, ALLOWED, "wrong", "skipped")


_LACKS = "second lacks"
_SECOND = "second agrees"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    lacking: Counter[str] = Counter()
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            told = dict(getattr(report, "user_properties", ()))
            if "picture" in told and (report.when == "call"):
                family = str(told["picture"]).split("/")[0]
                word = {"failed": "wrong", "skipped": "skipped"}.get(outcome, told.get("outcome"))
                counts[family][str(word)] += 1
                second = str(told.get("second", ""))
                counts[family][_SECOND if second == AGREES else _LACKS] += bool(second)
                lacking[second] += bool(second) and second != AGREES
    if not counts:
        return
    terminalreporter.section("pictures")
    row = "{:8}{:>7}" + "{:>20}" * (len(_COLUMNS) + 1)
    terminalreporter.write_line(row.format("format", "files", *_COLUMNS, _SECOND))
    for family, found in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        numbers = [found[column] for column in _COLUMNS]
        line = row.format(family, sum(numbers), *numbers, found[_SECOND])
        terminalreporter.write_line(line)
    for missing, number in (+lacking).items():
        terminalreporter.write_line(f"The second decoder of {number} files: {missing}")
