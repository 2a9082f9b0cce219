"""The report's plots as SVG texts, drawn by matplotlib in colours that the page's style names.

matplotlib is imported only here, when a report is written. Colours of the page (light or dark) are
put in afterwards: what is drawn in a stand-in colour becomes a CSS variable.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from redux_server.bench import cost
from redux_server.bench.target import Target

_TEXT, _GRID, _SURFACE = "#010101", "#020202", "#030303"
_SERIES = [f"#0404{number:02x}" for number in range(1, 9)]
_VARIABLES = {
    _TEXT: "var(--text-2)",
    _GRID: "var(--line)",
    _SURFACE: "var(--surface)",
    **{colour: f"var(--series-{place})" for place, colour in enumerate(_SERIES, 1)},
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _TEXT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "text.color": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "lines.linewidth": 2,
    "legend.frameon": False,
    "figure.dpi": 72,
}
_SIZE = (5.4, 3.4)  # inches of 72 points: as wide as a narrow screen, so that words stay readable
_MAX_POINTS = 2000


def latency_cdf(seconds: Mapping[str, Sequence[float]]) -> str:
    """The share of requests answered within so many seconds; "" where nothing was measured."""
    with rc_context(_STYLE):
        figure, axes = _figure()
        for place, values in enumerate(seconds.values()):
            ordered = np.sort(np.asarray(values, float))
            if len(ordered):
                share = np.arange(1, len(ordered) + 1) / len(ordered)
                steps = np.concatenate([ordered[:1], ordered])
                axes.step(steps, np.concatenate([[0.0], share * 100]), where="post", **_line(place))
        axes.set_xlim(left=0)
        axes.set_ylim(0, 101)
        axes.set_xlabel("latency, seconds")
        axes.set_ylabel("answered within it, %")
        return _svg(figure, "cdf") if any(len(each) for each in seconds.values()) else ""


def timeline(points: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Latency over the time of the run. ``points`` are (minute, seconds)."""
    with rc_context(_STYLE):
        figure, axes = _figure()
        for place, values in enumerate(points.values()):
            step = max(1, -(-len(values) // _MAX_POINTS))
            at = np.asarray(values[::step], float).reshape(-1, 2)
            axes.plot(
                *at.T, linestyle="none", marker="o", markersize=4, alpha=0.75,
                color=_SERIES[place % 8], markeredgewidth=0,
            )  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.set_xlabel("minute of the run")
        axes.set_ylabel("latency, seconds")
        return _svg(figure, "timeline") if any(len(each) for each in points.values()) else ""


def latency_over_rate(
    probes: Mapping[str, Sequence[Mapping[str, Any]]],
    knees: Mapping[str, float | None],
    slo_s: float,
) -> str:
    """p95 at each rate that was tried, the limit, and the knee of each target."""
    with rc_context(_STYLE):
        figure, axes = _figure()
        top = slo_s * 2.5
        for place, (name, tried) in enumerate(probes.items()):
            known = sorted(
                (each["images_per_minute"], min(top, each["p95_s"] or top)) for each in tried
            )
            if known:
                axes.plot(*zip(*known, strict=True), marker="o", markersize=5, **_line(place))
            if knees.get(name):
                axes.axvline(knees[name], color=_SERIES[place % 8], linewidth=1.2, linestyle=":")
        axes.axhline(slo_s, color=_TEXT, linewidth=1, linestyle="--")
        axes.annotate(
            f"limit {slo_s:g} s", (0.01, slo_s), xycoords=("axes fraction", "data"),
            xytext=(0, 4), textcoords="offset points",
        )  # fmt: skip
        axes.set_ylim(0, top * 1.04)
        axes.set_xlabel("images a minute asked for (dotted: the knee)")
        axes.set_ylabel("p95, seconds")
        return _svg(figure, "rate") if any(probes.values()) else ""


def cost_over_images(
    targets: Sequence[Target], per_minute: Mapping[str, float | None], even: float | None
) -> str:
    """Dollars a day over images a day; "" where no target has a price."""
    priced = [
        (place, target)
        for place, target in enumerate(targets)
        if cost.cost_per_day(target, 1, per_minute[target.name]) is not None
    ]
    if not priced:
        return ""
    days = [60 * 24 * rate for rate in per_minute.values() if rate]
    end = even * 2.5 if even else 1.2 * max(days, default=1000.0)
    counts = np.linspace(0, end, 400)
    with rc_context(_STYLE):
        figure, axes = _figure()
        for place, target in priced:
            rate = per_minute[target.name]
            dollars = [cost.cost_per_day(target, float(count), rate) or 0.0 for count in counts]
            axes.plot(counts, dollars, **_line(place))
        if even:
            axes.axvline(even, color=_TEXT, linewidth=1, linestyle=":")
            axes.annotate(
                f"break-even {even:,.0f}", (even, 0.96), xycoords=("data", "axes fraction"),
                xytext=(5, -6), textcoords="offset points",
            )  # fmt: skip
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("images a day")
        axes.set_ylabel("dollars a day")
        return _svg(figure, "cost")


def _figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _line(place: int) -> dict[str, Any]:
    return {"color": _SERIES[place % 8]}


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element of a page: it scales, and takes the page's colours and font."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    return text
