"""Compile the kernels for GPUs that are not there, and read off what the compiler made of them.

``compiled(90)`` records what the real launchers would launch on an sm_90, from CPU tensors: nothing
runs. ``measure`` counts registers, shared memory, spills and the widths of loads and stores in the
machine code. As a program it rewrites the record that test_offline_compile.py holds kernels to:

    PYTHONPATH=kernels python tests/kernels/offline_compile.py
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from redux_kernels import (
    adaln,
    attention,
    checks,
    gate_residual_adaln,
    gelu_into,
    gelu_quantize,
    group_norm_silu,
    merge_groups,
    qk_norm_rope,
    quantize_rows,
)
from redux_kernels.group_norm_silu import plan_pixels

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
FIRST_WITH_E4M3 = 89
RECORD = Path(__file__).with_name("offline_compile.json")
TOOLS = Path(nvidia.__file__).with_name("bin")

EPS = 1e-6
BF16 = torch.bfloat16


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    compiled: Any


class _AbsentGPU:
    """Triton's driver as far as compiling needs it; the device's number is its architecture."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def compiled(architecture: int) -> Iterator[list[Launch]]:
    """Within, kernels are compiled for this architecture, not launched; yields the launches."""
    launches: list[Launch] = []
    active, run = driver._active, JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launches.append(Launch(self.__name__, grid, kernel))
        return kernel

    driver.set_active(_AbsentGPU(architecture))
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver._active = active


def measure(kernel: Any) -> dict[str, Any]:
    """Registers a thread, bytes of shared memory and of stack, and counts of memory instructions.

    ``stack`` is what ptxas put into local memory, spills and local arrays alike, and
    ``local_instructions`` are the loads and stores that go there: a kernel without either spills
    nothing. ``narrow`` counts global loads and stores of fewer than 128 bits. ``mma`` names the
    instructions that multiply matrices.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    accesses = Counter(re.findall(r"\b(?:LDG|STG)\.[A-Z0-9.]+", code))
    wide = sum(count for name, count in accesses.items() if name.endswith(".128"))
    return {
        "registers": registers,
        "shared_bytes": kernel.metadata.shared,
        "stack": stack + local,
        "local_instructions": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "wide": wide,
        "narrow": sum(accesses.values()) - wide,
        "float64": kernel.asm["ptx"].count(".f64"),
        "mma": sorted(set(re.findall(r"\s([A-Z]+MMA)\b", code))),
    }


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


class Sizes(NamedTuple):
    rows: int
    heads: int
    d: int

    @property
    def width(self) -> int:
        return self.heads * self.d


MODELS = {"flux": Sizes(5337, 24, 128), "mini": Sizes(300, 4, 64)}


def launchers(rows: int, heads: int, d: int) -> dict[str, Callable[[], object]]:
    """A launch of every kernel as the model's blocks make it, on memory that nobody touches."""

    def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    width = heads * d
    x, y = empty(1, rows, width), empty(1, rows, width)
    gate, scale, shift = empty(1, 6 * width)[:, : 3 * width].chunk(3, dim=-1)
    qkv_mlp, beside_mlp = empty(1, rows, 7 * width), empty(1, rows, 5 * width)
    qkv, mlp = qkv_mlp.split((3 * width, 4 * width), dim=-1)
    weight, angles = empty(d), empty(rows, d // 2, dtype=torch.float32)
    q, out = empty(1, heads, rows, d), empty(1, rows, heads, d).transpose(1, 2)
    key, lse = empty(1, heads, d), empty(1, heads, rows, dtype=torch.float32)
    into = beside_mlp[..., :width].unflatten(-1, (heads, d)).transpose(1, 2)
    qk = empty(1, rows, 2, heads, d).transpose(1, 3)
    v = qkv[..., 2 * width :].unflatten(-1, (heads, d)).transpose(1, 2)
    per_key = empty(rows, dtype=torch.float32)
    after = gate_residual_adaln.launch
    pixels, affine, groups = empty(1, rows, d), empty(2, d).unbind(), d // 4
    mean = empty(1, groups, dtype=torch.float32)
    parts = empty(1, plan_pixels(rows, d).chunks, 2, d, dtype=torch.float32)

    def room(widths: int) -> checks.Quantized:
        return checks.empty_quantized(x, widths * width)

    def rope(v: Tensor | None) -> None:
        qk_norm_rope.launch(qkv, weight, weight, angles, angles, q, q, v, 0, EPS)

    def merge(parts: int, keys: int) -> None:
        singles = [key] * keys, [key] * keys, [6.0] * keys
        outs = [out] * parts, [lse] * parts, [0.0] * parts
        merge_groups.launch(*outs, q, *singles, into, None)

    return {
        "adaln": lambda: adaln.launch(x, scale, shift, EPS),
        "adaln_quantize": lambda: adaln.launch(x, scale, shift, EPS, *room(1)),
        "gate_residual_adaln": lambda: after(x, y, gate, scale, shift, EPS),
        "gate_residual_adaln_quantize": lambda: after(x, y, gate, scale, shift, EPS, *room(1)),
        "qk_norm_rope": lambda: rope(q),
        "qk_norm_rope, v stays": lambda: rope(None),
        "gelu_into": lambda: gelu_into.launch(mlp, beside_mlp, width),
        "gelu_quantize": lambda: gelu_quantize.launch(mlp, None, *room(4)),
        "gelu_quantize, beside": lambda: gelu_quantize.launch(mlp, x, *room(5)),
        "quantize_rows": lambda: quantize_rows.launch(out.transpose(1, 2).flatten(2), *room(1)),
        "merge_groups": lambda: merge(2, 1),
        "merge_groups, most": lambda: merge(merge_groups.MOST_PARTS, merge_groups.MOST_KEYS),
        "biased_attention": lambda: attention.launch(*qk.unbind(2), v, per_key, out),
        "group_norm_statistics": lambda: group_norm_silu.launch_channels(pixels),
        "group_norm_statistics, join": lambda: group_norm_silu.launch_join(parts, rows, groups),
        "group_norm_silu": lambda: group_norm_silu.launch(pixels, mean, mean, *affine, EPS),
    }


LAUNCHERS: dict[str, Callable[[], object]] = {
    f"{model} {name}": launch
    for model, sizes in MODELS.items()
    for name, launch in launchers(*sizes).items()
}


def needs_e4m3(label: str) -> bool:
    return "quantize" in label


def measured(label: str, architecture: int) -> dict[str, Any]:
    """Compile one labelled launch for an architecture and measure it."""
    with compiled(architecture) as launches:
        LAUNCHERS[label]()
    (launch,) = launches
    return {"grid": list(launch.grid), **measure(launch.compiled)}


def main() -> None:
    record = {
        label: {
            f"sm_{architecture}": measured(label, architecture)
            for architecture in ARCHITECTURES
            if architecture >= FIRST_WITH_E4M3 or not needs_e4m3(label)
        }
        for label in LAUNCHERS
    }
    lines = [f'  "triton": {json.dumps(triton.__version__)}']
    for label, by_architecture in record.items():
        rows = [f"    {json.dumps(a)}: {json.dumps(each)}" for a, each in by_architecture.items()]
        lines.append(f"  {json.dumps(label)}: {{\n" + ",\n".join(rows) + "\n  }")
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
