"""Two reports of the same workload and load: what became slower or faster, with an interval."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from redux_server.bench.statistics import PERCENTILES, Estimate, Latencies, ratio
from redux_server.settings import UsageError


class Change(NamedTuple):
    """How a percentile of one target changed: ``new / old``."""

    target: str
    percent: int
    ratio: Estimate

    @property
    def verdict(self) -> str:
        """``slower`` or ``faster`` if the whole interval says so."""
        if self.ratio.low > 1:
            return "slower"
        return "faster" if self.ratio.high < 1 else "no difference seen"


def read_report(place: str) -> dict[str, Any]:
    """A ``report.json``, or that in a folder.

    Raises:
        UsageError: it is none.
    """
    path = Path(place)
    path = path / "report.json" if path.is_dir() else path
    try:
        report = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        report = None
    if not isinstance(report, dict) or report.get("schema") != 1 or "targets" not in report:
        raise UsageError(f"{path} is no report of `flux-redux bench` that this version can read")
    return report


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """The changes of every target that is in both.

    Raises:
        UsageError: they did not ask for the same, or have no target in common.
    """
    if old["workload"]["hash"] != new["workload"]["hash"]:
        raise UsageError(
            "the two runs asked for different things (pictures, parameters or seeds), so their "
            "times cannot be compared"
        )
    if old["load"] != new["load"]:
        raise UsageError(
            f"the two runs had different loads ({_words(old)}; {_words(new)}), so their times "
            "cannot be compared"
        )
    shared = [name for name in new["targets"] if name in old["targets"]]
    if not shared:
        raise UsageError(
            f"no target is in both: {', '.join(old['targets'])} and {', '.join(new['targets'])}"
        )
    changes = []
    for name in shared:
        before, after = (_latencies(report["targets"][name]) for report in (old, new))
        if len(before) and len(after):
            changes += [Change(name, each, ratio(after, before, each)) for each in PERCENTILES]
    return changes


def lines(old: Mapping[str, Any], new: Mapping[str, Any], changes: list[Change]) -> list[str]:
    """The changes as a table, and what else is another."""
    said = []
    for change in changes:
        low, high = change.ratio.low, change.ratio.high
        was, now = (
            report["targets"][change.target]["latency_s"][f"p{change.percent}"]["value"]
            for report in (old, new)
        )
        said.append(
            f"{change.target}  p{change.percent}  {was:.3f} s -> {now:.3f} s  "
            f"x{change.ratio.value:.3f} ({low:.3f} to {high:.3f})  {change.verdict}"
        )
    for name, told in new["targets"].items():
        before = old["targets"].get(name)
        if before is not None and before["errors"] != told["errors"]:
            said.append(f"{name}  errors {before['errors']} -> {told['errors']}")
    return said


def is_regression(changes: list[Change]) -> bool:
    """Whether a median or a p95 became slower; p99 swings too much to fail a build."""
    return any(each.verdict == "slower" and each.percent < 99 for each in changes)


def _latencies(told: Mapping[str, Any]) -> Latencies:
    """Blocks of two runs have nothing in common but their numbers, so they are left out."""
    seconds = told["samples"]["latency_s"]
    return Latencies.of(seconds, [0] * len(seconds))


def _words(report: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in report["load"].items())
