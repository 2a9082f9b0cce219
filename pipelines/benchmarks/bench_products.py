"""A CPU's float32 products through oneDNN against torch's own, at the shapes of a network's step.

    make bench-products ARGS="--threads 1 --hidden 3072 --rows 1753"

Prints JSON, also written to bench-results/products.json after each product. The two alternate, so
that what else the machine does falls on both; a ratio is the median over pairs of neighbouring
calls, oneDNN's over torch's. ``cpu_capability`` is what torch's own loops use.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import environment, save
from torch import Tensor

from redux_pipelines import onednn
from redux_pipelines.network.layers import gelu_

HIDDEN = (256, 3072)
ROWS = (1753, 5337)
"""Picture and image with folded text at 512 × 512, and with an encoded prompt at 1024 × 1024."""

Call = Callable[[], Tensor]


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description="Time products on a CPU.")
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN, help="(%(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench-results/products.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases: list[dict[str, Any]] = []
    report = {
        "environment": environment(
            threads=options.threads,
            repeats=options.repeats,
            cpu_capability=torch.backends.cpu.get_cpu_capability(),
            torch_multiplies_with="MKL" if torch.backends.mkl.is_available() else "other BLAS",
        ),
        "refused": onednn.refusal(torch.device("cpu"), torch.float32),
        "cases": cases,
    }
    text = save(report, options.out)
    for hidden, rows in product(options.hidden, options.rows):
        for name, pair in _pairs(rows, hidden):
            cases.append(_measured(name, rows, hidden, pair, options.repeats))
            text = save(report, options.out)
    print(text)


def _pairs(rows: int, hidden: int) -> Iterator[tuple[str, tuple[Call, Call]]]:
    """A block's products, torch's before ours."""

    def layer(columns: int, out: int) -> tuple[Tensor, Tensor]:
        return torch.randn(out, columns) * columns**-0.5, torch.randn(out)

    x, attention = torch.randn(rows, hidden), torch.randn(rows, hidden)
    qkv, up, down = layer(hidden, 3 * hidden), layer(hidden, 4 * hidden), layer(4 * hidden, hidden)
    both = layer(5 * hidden, hidden)
    yield "qkv", (lambda: F.linear(x, *qkv), lambda: onednn.linear(x, *qkv))
    yield (
        "mlp",
        (lambda: F.linear(gelu_(F.linear(x, *up)), *down), lambda: onednn.mlp(x, *up, *down)),
    )

    def torchs() -> Tensor:
        return F.linear(torch.cat([attention, gelu_(F.linear(x, *up))], dim=-1), *both)

    def ours() -> Tensor:
        mlp = onednn.mlp(x, *up, both[0][:, hidden:], both[1])
        return onednn.add_linear(attention, both[0][:, :hidden], mlp)

    yield "single block's mlp and output", (torchs, ours)


@torch.inference_mode()
def _measured(
    name: str, rows: int, hidden: int, pair: tuple[Call, Call], repeats: int
) -> dict[str, Any]:
    theirs, ours = pair
    expected = theirs()
    difference = float((ours() - expected).norm() / expected.norm())
    times = [(_seconds(theirs), _seconds(ours)) for _ in range(repeats)]
    return {
        "product": name,
        "rows": rows,
        "hidden": hidden,
        "ratio": round(statistics.median(own / other for other, own in times), 3),
        "torch_ms": round(1000 * statistics.median(other for other, _ in times), 2),
        "onednn_ms": round(1000 * statistics.median(own for _, own in times), 2),
        "relative_difference": difference,
    }


def _seconds(call: Call) -> float:
    """Of processor time."""
    started = time.process_time()
    call()
    return time.process_time() - started


if __name__ == "__main__":
    main()
