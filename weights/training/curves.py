"""Draws how a training run went: losses and retrieval over time, from its journals.

    python -m training.curves --work DIR --out curves.png

Knows the journals' fields; reads nothing else.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from training.workplace import DEFAULT_ROOT, Workplace

_LOSSES = {
    "flow": "flow, 512 × 512",
    "flow_of_larger": "flow, larger",
    "flow_of_text": "flow, text only",
}
_PROBES = {
    "top1_trained_8x8": "trained, 512 × 512",
    "top1_held_out_8x8": "held out, 512 × 512",
    "top1_held_out_16x16": "held out, 1024 × 1024",
    "top1_held_out_8x24": "held out, 1536 × 512",
}


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Its lines; of steps that were trained twice (a run killed and resumed) the later ones."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines():
        line = json.loads(text)
        while lines and lines[-1]["minutes"] > line["minutes"]:
            lines.pop()
        lines.append(line)
    return lines


def draw(journal: list[dict[str, Any]], out: Path) -> None:
    """Write a PNG of two panels over minutes of training."""
    mpl.use("agg")
    figure, (losses, probes) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for axes, event, names in ((losses, "step", _LOSSES), (probes, "look", _PROBES)):
        for name, label in names.items():
            given = [line for line in journal if line["event"] == event and name in line]
            if given:
                minutes = [line["minutes"] for line in given]
                values = [line[name] for line in given]
                axes.plot(minutes, values, label=label, linewidth=1.2)
        axes.set_xlabel("minutes of training")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    losses.set_yscale("log")
    losses.set_ylabel("loss")
    probes.set_ylabel("pixel retrieval, top 1 (n = 16)")
    probes.set_ylim(0, 1.03)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, default=DEFAULT_ROOT)
    parser.add_argument("--out", type=Path, help="default: curves.png in the report folder")
    options = parser.parse_args()
    place = Workplace(options.work)
    out = options.out or place.report / "curves.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(read_journal(place.model / "model.jsonl"), out)
    print(out)


if __name__ == "__main__":
    main()
