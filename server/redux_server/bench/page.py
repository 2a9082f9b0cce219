"""The report as one HTML page that needs nothing else: no script, no font, no network.

All text of targets is escaped. Knows only what ``report.json`` says, plots, and small pictures.
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import Any

from redux_server.bench.summary import STAGES

LIMITS_OF_IT = (
    "<b>[pro] is not [dev].</b> The hosted endpoint runs FLUX.1 [pro] Redux, whose weights are not "
    "public; this server runs FLUX.1 [dev] + Redux or smaller. Their images differ by nature, and "
    "the same seed means nothing across them.",
    "<b>Likeness is not beauty.</b> It says that two pictures show the same things to an image "
    "encoder. Which image is the better one is for people to say: look at the sheet.",
    "<b>The network is part of it.</b> A server on this machine is reached in no time, a hosted "
    "one over the internet; latency counts from here, up to the last byte of the images.",
    "<b>One day is one day.</b> Targets were asked by turns, so that the hour falls on all alike, "
    "but another day, region or account may be slower or faster.",
)


@dataclass(slots=True)
class Row:
    """One row of the contact sheet: JPEGs, or None where there is no picture."""

    caption: str
    source: bytes | None
    outputs: Sequence[bytes | None]


@dataclass(slots=True)
class Drawn:
    """What the page shows beside figures: SVG texts, and the contact sheet."""

    cdf: str = ""
    timeline: str = ""
    rate: str = ""
    cost: str = ""
    sheet: list[Row] = field(default_factory=list)


def page(report: Mapping[str, Any], drawn: Drawn) -> str:
    """The whole page."""
    names = list(report["targets"])
    style = files("redux_server.bench").joinpath("report.css").read_text("utf-8")
    parts = [
        f"<h1>{escape(' against '.join(names))}</h1>",
        f'<p class="sub">{escape(_subtitle(report))}</p>',
        *(f'<p class="verdict">{text}</p>' for text in _verdicts(report)),
        _findings(report),
        _cards(report),
        _latency(report),
        _plots(names, drawn),
        _stages(report),
        _quality(report),
        _sheet(names, drawn.sheet),
        _costs(report),
        _errors(report),
        _limits(),
        _facts(report),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(' against '.join(names))}: flux-redux bench</title>\n"
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


# --- words ----------------------------------------------------------------------------------------


def _subtitle(report: Mapping[str, Any]) -> str:
    load, workload = report["load"], report["workload"]
    how = {
        "closed": lambda: _clients(load["clients"]),
        "open": lambda: f"{load['rate_per_minute']:g} images a minute, {load['arrivals']} arrivals",
        "knee": lambda: f"searching the rate whose p95 reaches {load['slo_s']:g} s",
    }[load["kind"]]()
    stopped = "; stopped before its end" if report["interrupted"] else ""
    return (
        f"{report['made_at']} · {workload['parameters']['size']}, "
        f"{workload['parameters']['num_inference_steps']} steps · {how}{stopped}"
    )


def _clients(count: int) -> str:
    return f"{count} clients, each waiting for its image" if count > 1 else "one client"


def _verdicts(report: Mapping[str, Any]) -> list[str]:
    """Which target takes longer at the median, if the interval says so."""
    names, said = list(report["targets"]), []
    for place, below in enumerate(names):
        for above in names[place + 1 :]:
            found = report["ratios"].get(f"{above}/{below}")
            if found is None:
                continue
            slow, fast, told = above, below, found["p50"]
            if told["value"] < 1:
                slow, fast, told = below, above, report["ratios"][f"{below}/{above}"]["p50"]
            low, high = told["ci95"]
            interval = f"95 % interval {low:.2f} to {high:.2f}"
            if low <= 1 <= high:
                said.append(
                    f"Between {_name(names, slow)} and {_name(names, fast)} no difference was seen "
                    f"at the median ({interval})."
                )
            else:
                said.append(
                    f"{_name(names, slow)} takes <b>{told['value']:.2f} times</b> as long as "
                    f"{_name(names, fast)} at the median ({interval})."
                )
    return said


def _findings(report: Mapping[str, Any]) -> str:
    parts = []
    if report["findings"]:
        parts.append(f'<section class="panel findings"><h2>Found</h2>{_list(report["findings"])}'
                     "</section>")  # fmt: skip
    if report["notes"]:
        parts.append(f'<div class="notes">{_list(report["notes"])}</div>')
    return "\n".join(parts)


def _list(texts: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def _limits() -> str:
    items = "".join(f"<li>{text}</li>" for text in LIMITS_OF_IT)
    return f'<h2>What this cannot tell</h2><section class="panel"><ul>{items}</ul></section>'


# --- figures --------------------------------------------------------------------------------------


def _cards(report: Mapping[str, Any]) -> str:
    cards = []
    for place, (name, told) in enumerate(report["targets"].items(), 1):
        rows = [
            ("images a minute", _number(told["images_per_minute"], 1)),
            ("price an image", _dollars(told["price_per_image"])),
            ("completed", f"{told['completed']} of {told['requests']}"),
        ]
        if told["knee"]:
            rows.insert(
                1, ("carried within the limit", f"{told['knee']['images_per_minute']:.1f} / min")
            )
        facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in rows)
        cards.append(
            f'<section class="panel card" style="--c: var(--series-{_series(place)})">'
            f'<h3>{escape(name)}</h3><div class="url">{escape(told["url"])}</div><dl>'
            f'<dt>median latency</dt><dd class="big">{_seconds(told["latency_s"]["p50"]["value"])}'
            f"</dd>{facts}</dl></section>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _latency(report: Mapping[str, Any]) -> str:
    names = list(report["targets"])
    head = ["", "p50", "p95", "p99", "measured"]
    rows = [
        [
            _name(names, name),
            *(_estimate(told["latency_s"][key], _seconds) for key in ("p50", "p95", "p99")),
            str(told["measured"]),
        ]
        for name, told in report["targets"].items()
    ]
    for place, below in enumerate(names):
        for above in names[place + 1 :]:
            found = report["ratios"].get(f"{above}/{below}")
            if found:
                label = f"{escape(above)} / {escape(below)}"
                rows.append(
                    [label, *(_estimate(found[k], _times) for k in ("p50", "p95", "p99")), ""]
                )
    since = "the scheduled start" if report["load"]["kind"] != "closed" else "the submit"
    return (
        f'<h2>Latency</h2><div class="panel scroll">{_table(head, rows)}</div>'
        f'<p class="note">From {since} to the last byte of the images, in seconds, with 95 % '
        "intervals. Warm-up and cool-down are left out; what the bench's own polling adds is not "
        "in it.</p>"
    )


def _plots(names: Sequence[str], drawn: Drawn) -> str:
    plots = [
        ("How many images come within how many seconds", drawn.cdf),
        ("Latency at each rate", drawn.rate),
        ("Latency over the run", drawn.timeline),
        ("What a day costs", drawn.cost),
    ]
    figures = "".join(
        f'<figure class="panel"><h3>{title}</h3>{svg}</figure>' for title, svg in plots if svg
    )
    if not figures:
        return ""
    legend = "".join(f"<span>{_name(names, name)}</span>" for name in names)
    return f'<h2>Plots</h2><div class="legend">{legend}</div><div class="plots">{figures}</div>'


def _stages(report: Mapping[str, Any]) -> str:
    names = list(report["targets"])
    words = ("submit", "waiting", "inference", "download")
    head = ["median of", *words, "polls a task", "a poll takes", "found later by"]
    rows = []
    for name, told in report["targets"].items():
        stages = [
            _estimate(told["stages_s"][stage]["p50"], _seconds) if told["stages_s"][stage] else "–"
            for stage in STAGES
        ]
        polling = told["polling"]
        cells = ["–"] * 3
        if polling:
            cells = [
                f"{polling['polls_per_task']:.1f}",
                _seconds(polling["seconds_per_poll"]),
                _seconds(polling["found_later_by_s"]),
            ]
        rows.append([_name(names, name), *stages, *cells])
    return (
        f'<h2>Where the time goes</h2><div class="panel scroll">{_table(head, rows)}</div>'
        '<p class="note">Inference is what the target itself says; waiting is the rest between '
        "the accepted submit and the finished task. The last three columns are of the bench, not "
        "of the target.</p>"
    )


def _quality(report: Mapping[str, Any]) -> str:
    names, quality = list(report["targets"]), report["quality"]
    head = ["", "images", "likeness to input", "diversity over seeds", "safety checker fired"]
    rows = [
        [
            _name(names, name),
            str(told["images"]),
            _spread(told["likeness_to_input"]),
            _spread(told["diversity_over_seeds"]),
            str(told["safety_checker_fired"]),
        ]
        for name, told in quality["targets"].items()
    ]
    text = f'<h2>Images</h2><div class="panel scroll">{_table(head, rows)}</div>'
    pairs = [
        [escape(name.replace("/", " and ")), str(told["images"]), _spread(told["likeness"]),
         _spread(told.get("ssim")), _spread(told.get("psnr_db"), " dB"),
         str(told.get("equal_pixels", "–"))]
        for name, told in quality["between"].items()
    ]  # fmt: skip
    if pairs:
        head = ["same request", "images", "likeness", "SSIM", "PSNR", "equal to the pixel"]
        text += f'<div class="panel scroll" style="margin-top: 12px">{_table(head, pairs)}</div>'
    by = "No image encoder was used"
    if quality["encoder"]:
        encoder = escape(quality["encoder"])
        by = f"Likeness is the cosine of two pictures' features by the image encoder of {encoder}"
    return (
        f'{text}<p class="note">{by}; diversity is how far apart images of one input with other '
        "seeds are. SSIM and PSNR are for targets that claim the same weights (weights=NAME).</p>"
    )


def _sheet(names: Sequence[str], rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{_name(names, name)}</th>" for name in names)
    body = "".join(
        f"<tr><td>{_picture(row.source, 'input')}</td>"
        + "".join(
            f"<td>{_picture(output, f'{name}, {row.caption}')}</td>"
            for name, output in zip(names, row.outputs, strict=True)
        )
        + f'<td class="none">{escape(row.caption)}</td></tr>'
        for row in rows
    )
    return (
        '<h2>Contact sheet</h2><div class="panel scroll sheet"><table><thead><tr><th>input</th>'
        f"{head}<th></th></tr></thead><tbody>{body}</tbody></table></div>"
    )


def _costs(report: Mapping[str, Any]) -> str:
    said = []
    for pair, told in report["break_even"].items():
        rented, paid = (escape(name) for name in pair.split("/"))
        if told["images_per_day"] is None:
            said.append(
                f"A GPU for <b>{rented}</b> at ${told['gpu_per_day']:.2f} a day never costs less "
                f"than {paid}: it makes {told['capacity_per_day_of_one_gpu']:,.0f} images a day."
            )
        else:
            said.append(
                f"From <b>{told['images_per_day']:,} images a day</b> on, {rented} on a GPU at "
                f"${told['gpu_per_day']:.2f} a day costs less than {paid}."
            )
    if not said:
        return ""
    paragraphs = "".join(f"<p>{each}</p>" for each in said)
    return f'<h2>Cost</h2><section class="panel">{paragraphs}</section>'


def _errors(report: Mapping[str, Any]) -> str:
    names = list(report["targets"])
    head = [
        "",
        "errors",
        "by kind",
        "429",
        "held back",
        "repeated submits",
        "not sent",
        "unfinished",
    ]
    rows = []
    for name, told in report["targets"].items():
        kinds = ", ".join(f"{kind} ×{count}" for kind, count in told["errors_by_kind"].items())
        limited = told["rate_limited"]
        rows.append(
            [
                _name(names, name),
                str(told["errors"]),
                escape(kinds or "–"),
                str(limited["answers"]),
                _seconds(limited["held_back_s"]),
                *(str(told[key]) for key in ("submits_repeated", "not_sent", "unfinished")),
            ]
        )
    return f'<h2>Errors</h2><div class="panel scroll">{_table(head, rows)}</div>'


def _facts(report: Mapping[str, Any]) -> str:
    workload = report["workload"]
    facts = {
        "workload": workload["hash"],
        "pictures": ", ".join(workload["pictures"][:20]),
        "parameters": json.dumps(workload["parameters"]),
        "first seed": str(workload["seed"]),
        **{key: str(value) for key, value in report["environment"].items()},
    }
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return (
        f'<h2>How it was made</h2><section class="panel"><dl class="facts">{items}</dl>'
        f"<pre>{escape(report['command'])}</pre></section>"
    )


# --- cells ----------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _series(place: int) -> int:
    return (place - 1) % 8 + 1


def _name(names: Sequence[str], name: str) -> str:
    place = _series(names.index(name) + 1)
    return f'<span class="key" style="--c: var(--series-{place})"></span>{escape(name)}'


def _picture(data: bytes | None, what: str) -> str:
    if data is None:
        return '<span class="none">no image</span>'
    text = base64.b64encode(data).decode()
    return f'<img alt="{escape(what, quote=True)}" src="data:image/jpeg;base64,{text}">'


def _estimate(told: Mapping[str, Any], shown: Any) -> str:
    if told["value"] is None:
        return "–"
    low, high = told["ci95"]
    return f'{shown(told["value"])}<span class="ci">{shown(low)} to {shown(high)}</span>'


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value and value < 0.1:
        return f"{value * 1000:.1f} ms"
    return f"{value:.2f} s" if value < 100 else f"{value:.0f} s"


def _times(value: float) -> str:
    return f"{value:.2f}×"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _dollars(value: float | None) -> str:
    return "–" if value is None else f"${value:.4f}".rstrip("0").rstrip(".")


def _spread(told: Mapping[str, Any] | None, unit: str = "") -> str:
    if not told:
        return "–"
    return f'{told["mean"]:.3g}{unit}<span class="ci">least {told["least"]:.3g}{unit}</span>'
