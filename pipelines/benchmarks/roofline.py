"""A lower bound on the time of FLUX.1 + Redux on a GPU, from sizes and data sheets alone.

    make bench-roofline

Counts the operations of our network's matrix products and attention, and the bytes that its fused
kernels move, and divides by what the vendor says the GPU can do at most. Nothing here is measured,
and no implementation reaches it; a measured time below it would be a mistake.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"))

import traffic

HIDDEN, HEADS, HEAD_DIM, DEPTH, DEPTH_SINGLE = 3072, 24, 128, 19, 38
CHANNELS, CONTEXT, PICTURE, TEXT, STEPS = 64, 4096, 729, 512, 28
SIZES = (512, 1024, 1536)
BFLOAT16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peaks of a data sheet, without sparsity: TFLOP/s with float32 sums, and TB/s of memory."""

    name: str
    bf16: float
    fp8: float | None
    memory: float


GPUS = (
    Gpu("RTX 4090 (24 GB)", 165.2, 330.3, 1.008),
    Gpu("L40S (48 GB)", 362.0, 733.0, 0.864),
    Gpu("A100 SXM (80 GB)", 312.0, None, 2.039),
    Gpu("H100 SXM (80 GB)", 989.4, 1978.9, 3.35),
)
"""NVIDIA's data sheets and the Ada architecture whitepaper (RTX 4090), as read in November 2026."""


@dataclass(frozen=True, slots=True)
class Work:
    """One denoising step of one image: operations, and bytes outside of matrix products."""

    gemm_tflop: float
    attention_tflop: float
    row_gigabytes: float

    @property
    def tflop(self) -> float:
        """All operations."""
        return self.gemm_tflop + self.attention_tflop

    def seconds(self, gpu: Gpu, *, fp8: bool = False, steps: int = STEPS) -> float | None:
        """No less than this, or None where the GPU has no fp8; attention stays in bfloat16."""
        peak = gpu.fp8 if fp8 else gpu.bf16
        if peak is None:
            return None
        products = self.gemm_tflop / peak + self.attention_tflop / gpu.bf16
        return steps * (products + self.row_gigabytes / 1000 / gpu.memory)


def step(size: int, *, text: int = 1) -> Work:
    """A step at ``size`` × ``size`` pixels with ``text`` rows of text; an empty prompt is one."""
    img, txt = (size // 16) ** 2, text + PICTURE
    return Work(_gemm(img, txt) / 1e12, _attention(img, txt) / 1e12, _rows(img + txt) / 1e9)


def diffusers_tflop(size: int) -> float:
    """What diffusers' transformer computes: all 512 text rows, every row in each block.

    And at every step, what ours does once: the text's embedding and all modulations.
    """
    img, txt = (size // 16) ** 2, TEXT + PICTURE
    rows = img + txt
    blocks = (DEPTH + DEPTH_SINGLE) * (24 * HIDDEN**2 * rows + 4 * HIDDEN * rows**2)
    modulations = 2 * (12 * DEPTH + 3 * DEPTH_SINGLE + 2) * HIDDEN**2
    ends = 4 * CHANNELS * HIDDEN * img + 2 * CONTEXT * HIDDEN * txt
    return (blocks + modulations + ends) / 1e12


def _gemm(img: int, txt: int) -> int:
    """24 H² per row and block; of the last block's text rows only queries, keys and values."""
    rows = img + txt
    whole = (DEPTH + DEPTH_SINGLE - 1) * 24 * HIDDEN**2 * rows
    last = HIDDEN**2 * (24 * img + 6 * txt)
    return whole + last + 4 * CHANNELS * HIDDEN * img  # into the network and out of it


def _attention(img: int, txt: int) -> int:
    rows = img + txt
    return 4 * HIDDEN * rows * ((DEPTH + DEPTH_SINGLE - 1) * rows + img)


def _rows(rows: int) -> int:
    """Bytes of the fused row kernels of all blocks (``kernels/benchmarks/traffic.py``)."""
    norm = traffic.gate_residual_adaln(rows, HIDDEN)
    merge = traffic.merge_groups(rows, HEADS, HEAD_DIM)
    gelu = traffic.gelu_into(rows, 4 * HIDDEN)
    double = 2 * norm + traffic.qk_norm_rope(rows, HEADS, HEAD_DIM) + gelu + merge
    placed = traffic.qk_norm_rope(rows, HEADS, HEAD_DIM, copies_v=False)
    return DEPTH * double + DEPTH_SINGLE * (norm + placed + gelu + merge)


def table() -> str:
    """The bounds as Markdown."""
    head = [f"{size}² {kind}" for size in SIZES for kind in ("bf16", "fp8")]
    lines = ["| GPU | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"]
    for gpu in GPUS:
        cells = [step(size).seconds(gpu, fp8=fp8) for size in SIZES for fp8 in (False, True)]
        told = ["–" if cell is None else f"{cell:.2f} s" for cell in cells]
        lines.append(f"| {gpu.name} | " + " | ".join(told) + " |")
    return "\n".join(lines)


def work_table() -> str:
    """What is computed, as Markdown."""
    lines = [
        "| size | diffusers | empty prompt | encoded prompt | saved |",
        "|---|---|---|---|---|",
    ]
    for size in SIZES:
        theirs, empty, encoded = (
            diffusers_tflop(size),
            step(size).tflop,
            step(size, text=TEXT).tflop,
        )
        saved = f"{1 - empty / theirs:.1%}, {1 - encoded / theirs:.1%}"
        lines.append(f"| {size}² | {theirs:.1f} | {empty:.1f} | {encoded:.1f} | {saved} |")
    return "\n".join(lines)


def main() -> None:
    print("TFLOP per step\n\n" + work_table())
    print(f"\nLower bound on {STEPS} steps, empty prompt, transformer only\n\n" + table())


if __name__ == "__main__":
    main()
