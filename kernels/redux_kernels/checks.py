"""What operators demand of their tensors, and the errors that say so.

Every function raises ``ValueError`` with the tensor's name, what was given and what is allowed.
The checks look at metadata only, so they run in eager mode and while a graph is traced alike. In
eager mode ``once`` runs them, once for all calls that look alike: a step makes hundreds. Within
``once_for`` a whole computation looks alike if what it starts from does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_E4M3 = torch.float8_e4m3fn
MAX_WIDTH = 16384  # a row that a program holds in registers
HEAD_SIZES = (16, 32, 64, 128, 256)
MOST_PASSED = 4096  # of some bytes each; a network of one size needs a dozen

_passed: set[Hashable] = set()


class _Thread(threading.local):
    """What one thread is at: whether all of its calls have passed before."""

    repeats = False


_thread = _Thread()


def once(check: Callable[..., None], *arguments: object) -> None:
    """``check(*arguments)``, unless it has passed for tensors and numbers that are like these.

    ``check`` looks at shapes, strides, dtypes and devices of tensors, and at numbers.
    """
    if _thread.repeats:
        return
    key = (
        check,
        *[
            (each.shape, each.stride(), each.dtype, each.device)
            if isinstance(each, Tensor)
            else _others(each)
            for each in arguments
        ],
    )
    if key in _passed:
        return
    check(*arguments)
    if len(_passed) >= MOST_PASSED:
        _passed.clear()
    _passed.add(key)


@contextmanager
def once_for(passed: set[Hashable], *tensors: Tensor) -> Iterator[None]:
    """Within, ``once`` checks nothing if all of this has passed for tensors that are like these.

    For a computation in which every operator's tensors and numbers follow from ``tensors``, and
    from what stays as it is for as long as ``passed`` is kept, which starts empty: to look at each
    of the 2,000 tensors of a step is a fifth of what its Python takes. Other threads check as ever.
    """
    key, before = _others(tensors), _thread.repeats
    _thread.repeats = before or key in passed
    try:
        yield
    finally:
        _thread.repeats = before
    passed.add(key)


def _others(argument: object) -> Hashable:
    """A number as it is; of a list's tensors what counts."""
    if not isinstance(argument, (list, tuple)):
        return argument
    return tuple(
        (each.shape, each.stride(), each.dtype, each.device) if isinstance(each, Tensor) else each
        for each in argument
    )


def check_matrix(name: str, x: Tensor) -> None:
    """``x`` is (B, S, width) with contiguous rows and a float dtype; rows may lie apart."""
    check_float(name, x)
    if x.dim() != 3:
        raise ValueError(f"{name} must be (batch, rows, width), got shape {tuple(x.shape)}")
    check_last_stride(name, x)


def check_rows(name: str, x: Tensor) -> None:
    """``x`` is a matrix as above whose rows fit into a program's registers."""
    check_matrix(name, x)
    if not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"{name} must be 1 to {MAX_WIDTH} wide, got {x.shape[-1]}")


def check_float(name: str, x: Tensor) -> None:
    """``x`` is bfloat16, float16 or float32."""
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} must be bfloat16, float16 or float32, got {x.dtype}")


def check_last_stride(name: str, x: Tensor) -> None:
    """The last axis of ``x`` is contiguous."""
    if x.shape[-1] != 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous along its last axis, got stride {x.stride(-1)}: "
            "call .contiguous() on it"
        )


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], why: str) -> None:
    """``x`` has exactly this shape; ``why`` names the axes, for the message."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must be {why} = {shape}, got {tuple(x.shape)}")


def check_vector(name: str, v: Tensor, x: Tensor) -> None:
    """``v`` is (B, width) for the rows ``x`` (B, S, width): one vector for an image's rows.

    Or (width,), one for the rows of all images.
    """
    check_float(name, v)
    if v.dim() == 1:
        check_shape(name, v, (x.shape[-1],), "(width,)")
    else:
        check_shape(name, v, (x.shape[0], x.shape[-1]), "(width,) or (batch, width)")
    check_last_stride(name, v)


def image_stride(v: Tensor) -> int:
    """From an image's vector to the next one's: 0 where one serves all."""
    return v.stride(0) if v.dim() == 2 else 0


def check_same_device(**tensors: Tensor | None) -> None:
    """All tensors lie on one device."""
    devices = {name: str(t.device) for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"all tensors must be on one device, got {devices}")


def check_dtype(name: str, x: Tensor, dtype: torch.dtype) -> None:
    """``x`` has this dtype."""
    if x.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {x.dtype}")


Quantized = tuple[Tensor, Tensor]
"""Rows in e4m3 and their scales ``(…, 1)`` in float32, so that a row is about ``q * scale``."""


def empty_quantized(x: Tensor, width: int) -> Quantized:
    """Room for ``width`` columns of e4m3 per row of ``x`` (B, S, H), and for the rows' scales.

    ``(B·S, width)`` and ``(B·S, 1)``, as a scaled product takes them.
    """
    count = x.shape[0] * x.shape[1]
    q = x.new_empty((count, width), dtype=_E4M3)
    return q, x.new_empty((count, 1), dtype=torch.float32)


def check_quantized(x: Tensor, width: int, q: Tensor, row_scale: Tensor) -> None:
    """``q`` and ``row_scale`` are room for the rows of ``x`` (B, S, H) with ``width`` columns."""
    count = x.shape[0] * x.shape[1]
    for name, each, columns, dtype in (
        ("q", q, width, _E4M3),
        ("row_scale", row_scale, 1, torch.float32),
    ):
        check_dtype(name, each, dtype)
        check_shape(name, each, (count, columns), "(batch · rows, columns)")
        if not each.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {each.stride()}")
    check_same_device(x=x, q=q, row_scale=row_scale)


def write_quantized(made: Quantized, q: Tensor, row_scale: Tensor) -> None:
    """Copy what a reference gave, ``(B, S, …)``, to where an operator writes its rows."""
    for room, each in zip((q, row_scale), made, strict=True):
        room.copy_(each.view(room.shape))


def check_heads(name: str, x: Tensor) -> tuple[int, int, int, int]:
    """``x`` is (batch, heads, rows, d), contiguous along d, of a float dtype; gives that shape."""
    check_float(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name} must be (batch, heads, rows, d), got shape {tuple(x.shape)}")
    check_last_stride(name, x)
    batch, heads, rows, d = x.shape
    return batch, heads, rows, d


def check_head_size(name: str, d: int) -> None:
    """A head is a power of two wide, from 16 to 256."""
    if d not in HEAD_SIZES:
        raise ValueError(f"{name} must have a head size in {HEAD_SIZES}, got {d}")


def check_laid_out_alike(name: str, tensors: Sequence[Tensor]) -> None:
    """All have the same strides, but for axes of one element."""
    for each in tensors[1:]:
        strides = zip(each.shape, each.stride(), tensors[0].stride(), strict=True)
        if any(size > 1 and own != other for size, own, other in strides):
            raise ValueError(
                f"all {name} must be laid out alike, got strides {tensors[0].stride()} and "
                f"{each.stride()}"
            )
