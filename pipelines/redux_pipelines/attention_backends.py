"""What computes attention: torch's own kernels, ours, the flash libraries.

``IMPLEMENTATIONS`` lists them, best first. None is trusted here: ``attention_choice`` tests each
before it is used. Knows no network.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from redux_kernels import dispatch
from redux_kernels.attention import biased_attention
from redux_kernels.self_test import self_test as test_kernels
from redux_pipelines import blocked_attention, onednn
from redux_pipelines.attention import (
    Capabilities,
    Groups,
    Implementation,
    grouped,
    key_bias,
    placed,
)
from redux_pipelines.flash_libraries import FLASH2, FLASH3, FLASH3_HUB, FLASH4

_ATEN = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)
_FLOAT = (torch.float32,)
_ALL = (*_HALF, *_FLOAT, torch.float64)
_CUDA, _CPU = ("cuda",), ("cpu",)
_SM80, _SM50 = Capabilities((8, 0)), Capabilities((5, 0))


def biased(q: Tensor, k: Tensor, v: Tensor, groups: Groups, into: Tensor | None = None) -> Tensor:
    """``scaled_dot_product_attention`` with one bias per key, for all heads and queries.

    torch's CPU kernel reads such a bias at no measurable cost.
    """
    kind = torch.promote_types(q.dtype, torch.float32)  # log 512 in bfloat16 is off by a percent
    bias = key_bias(groups, q.device, kind) if len(groups) > 1 else None  # one on all keys is none
    return placed(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), into)


def triton(q: Tensor, k: Tensor, v: Tensor, groups: Groups, into: Tensor | None = None) -> Tensor:
    """Our own kernel: every group in one launch."""
    bias = key_bias(groups, q.device, torch.float32).flatten()
    return placed(biased_attention(q, k, v, bias), into)


def _test_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Let the kernel run if it equals its reference: without it the operator runs the latter."""
    name = "biased_attention"
    test_kernels(device, heads=2, head_dim=head_dim, dtype=dtype, operators=(name,))
    return dispatch.refusal(name, device)


def onednn_blocks(
    q: Tensor, k: Tensor, v: Tensor, groups: Groups, into: Tensor | None = None
) -> Tensor:
    """By blocks, but ``biased`` where the keys are too few to gain by it."""
    attend = biased if k.shape[2] < blocked_attention.FEW_KEYS else blocked_attention.attend
    return attend(q, k, v, groups, into)


def _test_onednn(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """See ``Readiness``."""
    return onednn.refusal(device, dtype)


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, lse.unsqueeze(-1)


def _flash_cuda(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _ATEN._scaled_dot_product_flash_attention(q, k, v)
    return out, lse.unsqueeze(-1)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out, lse.view(*q.shape[:-1], 1)


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _ATEN._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return out, lse[..., : q.shape[2], None]  # the kernel pads its queries


IMPLEMENTATIONS = (
    FLASH4,
    FLASH3,
    FLASH3_HUB,
    Implementation("cudnn", grouped(_cudnn), _CUDA, _HALF, 16, _SM80),
    FLASH2,
    Implementation("flash", grouped(_flash_cuda), _CUDA, _HALF, 16, _SM80),
    Implementation("triton", triton, _CUDA, _HALF, 1, _SM80, _test_kernel),
    Implementation("efficient", grouped(_efficient), _CUDA, (*_HALF, *_FLOAT), 16, _SM50),
    Implementation("onednn", onednn_blocks, _CPU, _FLOAT, make_ready=_test_onednn),
    Implementation("biased", biased, _CPU, _ALL),
    Implementation("flash-cpu", grouped(_flash_cpu), _CPU, _ALL),
)
"""Best first. The CPU's order is measured. The GPU's is not: libraries in the order of what their
authors report, then ours, until ``bench_attention.py`` has run on one.
"""
