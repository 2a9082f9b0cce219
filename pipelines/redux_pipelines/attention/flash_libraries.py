"""The flash attentions one can install beside torch: FlashAttention 2, 3 and 4.

What each is called with and gives, read from their sources of August 2026, none run here:

* FlashAttention-4, package ``flash-attn-4`` (4.0 betas; Dao-AILab/flash-attention 0251105,
  flash_attn/cute/interface.py): ``flash_attn_func(q, k, v, …, softmax_scale, …, return_lse)`` gives
  ``(out, lse)`` always, ``lse`` None without ``return_lse``. Heads of up to 128, a multiple of 8.
  Its README names Hopper and Blackwell. Compiles at the first call.
* FlashAttention-3, module ``flash_attn_interface`` (the same repository's hopper/), or
  ``kernels-community/flash-attn3`` version 1 of the Hugging Face Hub through ``kernels`` 0.17:
  ``flash_attn_func(q, k, v, softmax_scale, …, return_attn_probs)`` gives ``(out, lse)`` with
  ``return_attn_probs`` (since pull request 1851, August 2025). Hopper.
* FlashAttention-2, package ``flash-attn`` 2.8: ``flash_attn_func(q, k, v, dropout_p,
  softmax_scale, …, return_attn_probs)`` gives ``(out, lse, dropout mask)`` then. Ampere and later.

All take ``(B, S, heads, D)`` with any strides but the last, which is how the network lays its rows
out, and give a float32 ``lse (B, heads, Q)`` of natural logarithms. All are BSD-3. Nothing is
imported before it is wanted, and nothing that fails to import does more than refuse itself.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from redux_kernels.registration import operator, register_fake
from redux_pipelines.attention.groups import Capabilities, Implementation, Partial, grouped

HUB_KERNEL = "kernels-community/flash-attn3"
HUB_VERSION = 1

_HALF = (torch.bfloat16, torch.float16)

Flash = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(B, S, heads, D)`` each to the output, laid out like them, and ``lse (B, heads, Q)``."""

_MODULES = frozenset(
    {"flash_attn", "flash_attn.cute", "flash_attn.flash_attn_interface"}
    | {"flash_attn_interface", "kernels"}
)
_loaded: dict[str, Flash] = {}


@operator("redux::flash_library", mutates_args=())
def flash_library(q: Tensor, k: Tensor, v: Tensor, library: str) -> tuple[Tensor, Tensor]:
    """A library's attention, opaque to ``torch.compile``, whatever the library does inside."""
    out, lse = _loaded[library](q, k, v)
    return out, lse


@register_fake(flash_library)
def _(q: Tensor, k: Tensor, v: Tensor, library: str) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, rows), dtype=torch.float32)


def _partial(library: str) -> Partial:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        out, lse = flash_library(q, k, v, library)
        return out.transpose(1, 2), lse.unsqueeze(-1)

    return attend


def _load_flash4() -> Flash:
    attend = importlib.import_module("flash_attn.cute").flash_attn_func

    def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attend(q, k, v, softmax_scale=_scale(q), return_lse=True)
        return out, lse

    return flash


def _load_flash3() -> Flash:
    return _flash3(importlib.import_module("flash_attn_interface"))


def _load_flash3_hub() -> Flash:
    kernels = importlib.import_module("kernels")
    if not hasattr(kernels, "get_kernel"):  # a folder of that name is a package, too
        raise ModuleNotFoundError("no package kernels", name="kernels")
    return _flash3(kernels.get_kernel(HUB_KERNEL, version=HUB_VERSION))


def _flash3(module: Any) -> Flash:
    attend = module.flash_attn_func

    def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attend(q, k, v, softmax_scale=_scale(q), return_attn_probs=True)
        return out, lse

    return flash


def _load_flash2() -> Flash:
    attend = importlib.import_module("flash_attn.flash_attn_interface").flash_attn_func

    def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, _ = attend(q, k, v, softmax_scale=_scale(q), return_attn_probs=True)
        return out, lse

    return flash


def _scale(q: Tensor) -> float:
    return 1 / math.sqrt(q.shape[-1])


def _implementation(
    name: str,
    load: Callable[[], Flash],
    package: str,
    capabilities: Capabilities,
    *,
    on_request: str = "",
) -> Implementation:
    def make_ready(_device: torch.device, _dtype: torch.dtype, _head_dim: int) -> str | None:
        try:
            _loaded[name] = load()
        except ModuleNotFoundError as error:
            if error.name in _MODULES:
                return f"is not installed ({package})"
            return f"cannot be loaded: {error}"
        except Exception as error:  # a broken library refuses itself, whatever it raises
            return f"cannot be loaded: {type(error).__name__}: {first_line(error)}"
        return None

    return Implementation(
        name,
        grouped(_partial(name)),
        ("cuda",),
        _HALF,
        capabilities=capabilities,
        make_ready=make_ready,
        on_request=on_request,
    )


def first_line(error: BaseException) -> str:
    """What an exception says, without its second line and all that follows."""
    return next(iter(str(error).splitlines()), "")


FLASH4 = _implementation(
    "flash4", _load_flash4, "pip install flash-attn-4", Capabilities((9, 0), 12)
)
FLASH3 = _implementation(
    "flash3",
    _load_flash3,
    "built from hopper/ of Dao-AILab/flash-attention",
    Capabilities((9, 0), 9),
)
FLASH3_HUB = _implementation(
    "flash3-hub",
    _load_flash3_hub,
    "pip install kernels",
    Capabilities((9, 0), 9),
    on_request=f"downloads {HUB_KERNEL} from the Hugging Face Hub, so it has to be asked for",
)
FLASH2 = _implementation("flash2", _load_flash2, "pip install flash-attn", Capabilities((8, 0)))
