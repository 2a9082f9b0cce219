"""A report as a Markdown table: a line for each run."""

from collections import Counter
from typing import Any

_HEAD = (
    "| run | struck | accepted | ended | lost | never ended | stuck | anomalies | other errors |"
    " longest | repeated |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def markdown(report: dict[str, Any]) -> str:
    """The table and, below it, how often each fault struck in all."""
    title = f"{report['what']}, engine {report['engine']}"
    if report["planted"]:
        title += f", with a planted bug ({report['planted']})"
    lines = [f"### {title}: {report['minutes']} minutes", "", _HEAD]
    total = Counter[str]()
    for run in report["runs"]:
        total.update(run["strikes"])
        lines.append(_line(run))
    struck = ", ".join(f"{count} × {name}" for name, count in sorted(total.items()))
    return "\n".join([*lines, "", f"Struck: {struck}."])


def _line(run: dict[str, Any]) -> str:
    ends = ", ".join(f"{count} {name}" for name, count in sorted(run["ends"].items()))
    cells = [
        run["name"],
        sum(run["strikes"].values()),
        run["accepted"],
        ends,
        run["lost"],
        run["never_ended"],
        run["stuck"],
        ", ".join(f"{count} × {kind}" for kind, count in run["anomalies"].items()) or 0,
        run["unexpected"] + run["failures"],
        f"{run['latency_s'].get('longest', 0)} s",
        run["attempts_repeated"],
    ]
    return "| " + " | ".join(map(str, cells)) + " |"
