"""Every attention that this device can run, at FLUX's sizes: the figures that decide their order.

    make bench-attention ARGS="--rows 4826 --dtype bfloat16"

One call as a block makes it: 24 heads of 128, folded text, 729 Redux rows (``--strength``), the
image's rows, filled up to the implementation's multiple, in the order in which the pipeline has
them. Prints JSON, also written to bench-results/attention.json after each number of rows, with the
reason of each that was refused. Calls alternate, so that what else the machine does falls on all; a
figure is the median.
"""

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import environment, save
from torch import Tensor

from redux_pipelines.attention.choice import IMPLEMENTATIONS, candidates_for, refusal
from redux_pipelines.attention.groups import Groups, Implementation
from redux_pipelines.conditioning.tokens import Conditioning, Tokens, fold_tokens
from redux_pipelines.devices import as_current, resolve_device, resolve_dtype
from redux_pipelines.network.flux import SINGLE_WIDTHS

HEADS, HEAD_DIM = 24, 128
REDUX_ROWS = 729
ROWS = (1754, 4826, 9946)
"""Folded rows at 512 × 512, 1024 × 1024 and 1536 × 1536."""


def main() -> None:
    """Measure, print and save."""
    arguments = _arguments()
    device = resolve_device(arguments.device)
    with as_current(device):
        print(_measured(arguments, device))


def _measured(arguments: argparse.Namespace, device: torch.device) -> str:
    """The report."""
    dtype = resolve_dtype(arguments.dtype, device)
    candidates = candidates_for(arguments.attention)
    is_asked = arguments.attention != "auto"
    refusals = {
        each.name: refusal(each, device, dtype, HEAD_DIM, asked_for=is_asked) for each in candidates
    }
    usable = [each for each in IMPLEMENTATIONS if refusals.get(each.name, "not asked") is None]
    milliseconds: dict[int, Any] = {}
    report = {
        "environment": environment(str(device), dtype=str(dtype), threads=torch.get_num_threads()),
        "refused": {name: reason for name, reason in refusals.items() if reason},
        "strength": arguments.strength,
        "milliseconds": milliseconds,
    }
    text = save(report, arguments.out)
    for rows in arguments.rows:
        milliseconds[rows] = _measure(
            usable, rows, device, dtype, arguments.repeats, arguments.strength
        )
        text = save(report, arguments.out)
    return text


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time each attention.")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="keys (%(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--attention", default="auto", help="names to time (%(default)s)")
    parser.add_argument("--strength", type=float, default=0.5, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("bench-results/attention.json"))
    return parser.parse_args()


def _measure(
    usable: list[Implementation],
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    strength: float,
) -> dict[str, Any]:
    """Median milliseconds a call and TFLOP/s by name."""
    inputs = {
        each.name: _inputs(groups_of(rows, each.row_multiple, strength), device, dtype)
        for each in usable
    }
    times: dict[str, list[float]] = {each.name: [] for each in usable}
    with torch.inference_mode():
        for _ in range(repeats + 2):
            for each in usable:
                times[each.name].append(_time_ms(each, inputs[each.name], device))
    tera = 4 * HEADS * HEAD_DIM * rows**2 / 1e12
    medians = {name: statistics.median(taken[2:]) for name, taken in times.items()}
    return {
        name: {"ms": round(ms, 3), "tflops": round(1000 * tera / ms, 2)}
        for name, ms in medians.items()
    }


Inputs = tuple[Tensor, Tensor, Tensor, Groups]


def groups_of(rows: int, row_multiple: int, strength: float) -> Groups:
    """Those of a request without a prompt whose keys are ``rows``, before any fill them up."""
    text = Tokens(torch.zeros(1, 1), copies=512)
    picture = Tokens(torch.zeros(REDUX_ROWS, 1), log_weight=math.log(strength))
    conditioning = Conditioning(text, (picture,), torch.zeros(1), guidance=3.5)
    return fold_tokens(conditioning, rows - 1 - REDUX_ROWS, row_multiple).groups


def _inputs(groups: Groups, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Rows as a single block lays them out: in one projection, with its MLP."""
    rows = sum(group.rows for group in groups)
    parts = torch.randn(1, rows, SINGLE_WIDTHS, HEADS, HEAD_DIM).to(device, dtype)
    q, k, v = parts[:, :, :3].permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v, groups


def _time_ms(attention: Implementation, inputs: Inputs, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        attention(*inputs)
        return 1000 * (time.perf_counter() - started)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(torch.cuda.current_stream(device))
    attention(*inputs)
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return begin.elapsed_time(end)


if __name__ == "__main__":
    main()
