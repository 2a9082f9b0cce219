"""Adds to the summary what became of the files of each format."""

from collections import Counter, defaultdict

import pytest

from pictures.check import ALLOWED, REFUSED, RIGHT

_COLUMNS = (RIGHT, REFUSED, ALLOWED, "wrong", "skipped")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            told = dict(getattr(report, "user_properties", ()))
            if "picture" in told and (report.when == "call"):
                family = str(told["picture"]).split("/")[0]
                word = {"failed": "wrong", "skipped": "skipped"}.get(outcome, told.get("outcome"))
                counts[family][str(word)] += 1
    if not counts:
        return
    terminalreporter.section("pictures")
    row = "{:8}{:>7}" + "{:>20}" * len(_COLUMNS)
    terminalreporter.write_line(row.format("format", "files", *_COLUMNS))
    for family, found in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        numbers = [found[column] for column in _COLUMNS]
        terminalreporter.write_line(row.format(family, found.total(), *numbers))
