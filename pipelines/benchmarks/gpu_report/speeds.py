"""Attention libraries, row kernels and matrix products, each alone, at FLUX's sizes.

Beside the bytes a second of a plain copy and the operations a second of one large product, both
measured in the same run: what this card gives at most. Row kernels are the cases of
``kernels/benchmarks``, whose torch code is eager here.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_report.clock import alternating, measure, milliseconds
from gpu_report.images import NEEDS_CUDA
from gpu_report.runner import NotRun, Section
from gpu_report.subject import TEXT_TOKENS, Subject
from redux_kernels import dispatch
from redux_kernels import self_test as kernel_test
from redux_pipelines.attention import choice
from redux_pipelines.attention.backends import IMPLEMENTATIONS
from redux_pipelines.attention.groups import Groups, Implementation, KeyGroup
from redux_pipelines.fp8 import self_test as fp8_test
from redux_pipelines.fp8.linear import Fp8Linear

Save = Callable[[], None]
MIB = 2**20


# --- attention ------------------------------------------------------------------------------------


@torch.inference_mode()
def attentions(subject: Subject, section: Section, save: Save) -> None:
    """Every implementation that may run here, with folded text, at three numbers of rows."""
    config = subject.scale.transformer
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    section.update(heads=heads, head_dim=head_dim, refused={}, rows={})
    usable = []
    for each in IMPLEMENTATIONS:
        reason = choice.refusal(each, subject.device, subject.dtype, head_dim)
        if reason is None:
            usable.append(each)
        else:
            section["refused"][each.name] = reason
    for rows in subject.scale.attention_rows:
        section["rows"][str(rows)] = {
            each.name: _attention(each, subject, rows, heads, head_dim) for each in usable
        }
        save()


def _attention(
    each: Implementation, subject: Subject, rows: int, heads: int, head_dim: int
) -> dict[str, Any]:
    filling = -rows % each.row_multiple
    qk = _random(subject, 1, filling + rows, 2, heads, head_dim)
    v = _random(subject, 1, filling + rows, heads, head_dim).transpose(1, 2)
    q, k = (part.transpose(1, 2) for part in qk.unbind(2))
    groups: Groups = (KeyGroup(1, math.log(TEXT_TOKENS)), KeyGroup(rows - 1, 0.0))
    if filling:
        groups = (KeyGroup(filling, -math.inf), *groups)
    timing = measure(lambda: each(q, k, v, groups), subject.device, subject.scale.calls)
    return {**timing, "tflops": _tflops(4 * heads * head_dim * rows**2, timing)}


# --- row kernels ----------------------------------------------------------------------------------


@torch.inference_mode()
def row_kernels(subject: Subject, section: Section) -> None:
    """Each kernel against the torch code that it replaces, with a cold cache; one size."""
    device, scale = subject.device, subject.scale
    section["copy_gb_per_s"] = copy_speed(subject)
    if device.type != "cuda":
        raise NotRun(NEEDS_CUDA)
    import bench_all  # of kernels/benchmarks

    verdicts = kernel_test.self_test(device)
    section.update(rows=scale.kernel_rows, refused={}, kernels={})
    for case in bench_all.cases(scale.kernel_rows, device):
        reason = verdicts[case.operator] or dispatch.refusal(case.operator, device)
        if reason is not None:
            section["refused"][case.operator] = reason
            continue
        section["kernels"][case.label] = _against(case, section["copy_gb_per_s"])


def _against(case: Any, copy_gb_per_s: float) -> dict[str, Any]:
    from triton.testing import do_bench  # type: ignore[import-untyped]

    kernel_ms, eager_ms = (
        float(do_bench(run, warmup=10, rep=50, return_mode="median"))
        for run in (case.call, case.replaced)
    )
    speed = case.size_bytes / kernel_ms / 1e6
    return {
        "kernel_ms": round(kernel_ms, 5),
        "torch_ms": round(eager_ms, 5),
        "ratio_to_torch": round(kernel_ms / eager_ms, 4),
        "gb_per_s": round(speed, 1),
        "share_of_copy": round(speed / copy_gb_per_s, 4),
    }


def copy_speed(subject: Subject) -> float:
    """GB/s of a copy on the device, bytes read and bytes written."""
    source = torch.empty(subject.scale.copied_bytes, dtype=torch.uint8, device=subject.device)
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), subject.device, 3 * subject.scale.calls)
    return round(2 * source.numel() / milliseconds(timing) / 1e6, 1)


# --- products -------------------------------------------------------------------------------------


@torch.inference_mode()
def products(subject: Subject, section: Section) -> None:
    """The blocks' matrix products, in the model's dtype and in fp8, beside a large square one."""
    width = subject.scale.transformer["attention_head_dim"]
    width *= subject.scale.transformer["num_attention_heads"]
    rows, side = subject.scale.kernel_rows, subject.scale.product_side
    peak = _product(subject, side, side, side)
    reason = fp8_test.refusal(subject.device, subject.dtype, width)
    fp8_peak = None if reason else _product(subject, side, side, side, is_fp8=True)
    section.update(rows=rows, peak=peak, fp8_peak=fp8_peak, fp8_refused=reason, products={})
    for name, inputs, outputs in (
        ("queries, keys, values", width, 3 * width),
        ("MLP in", width, 4 * width),
        ("MLP out", 4 * width, width),
        ("single block in", width, 7 * width),
        ("single block out", 5 * width, width),
    ):
        found = section["products"][name] = {"plain": _product(subject, rows, inputs, outputs)}
        found["plain"]["share_of_peak"] = _share(found["plain"], peak)
        if fp8_peak is not None:
            found["fp8"] = _product(subject, rows, inputs, outputs, is_fp8=True)
            found["fp8"]["share_of_peak"] = _share(found["fp8"], fp8_peak)


def _product(
    subject: Subject, rows: int, inputs: int, outputs: int, *, is_fp8: bool = False
) -> dict[str, Any]:
    x, weight = _random(subject, rows, inputs), _random(subject, outputs, inputs)
    bias = _random(subject, outputs)

    def run() -> Tensor:
        return F.linear(x, weight, bias)

    if is_fp8:  # rows come quantised from the kernel before
        from redux_kernels.reference import quantize_rows

        layer, (q, scale) = Fp8Linear.of(weight, bias), quantize_rows(x)

        def run() -> Tensor:
            return layer.forward_quantized(q, scale, x.dtype)

    (timing,) = alternating([run], subject.device, subject.scale.calls)
    return {**timing, "tflops": _tflops(2 * rows * inputs * outputs, timing)}


def _share(of: dict[str, Any], peak: dict[str, Any]) -> float:
    return round(float(of["tflops"]) / float(peak["tflops"]), 4)


def _tflops(operations: int, timing: dict[str, Any]) -> float:
    return float(f"{operations / milliseconds(timing) / 1e9:.4g}")


def _random(subject: Subject, *shape: int) -> Tensor:
    """Normal numbers: zeros would be multiplied at a higher clock."""
    made = torch.empty(shape, device=subject.device, dtype=subject.dtype)
    return made.normal_(generator=torch.Generator(subject.device).manual_seed(0))
