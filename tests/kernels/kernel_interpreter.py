"""Repairs of Triton's interpreter, without which its results are not those of a GPU.

Triton 3.7's interpreter truncates float32 to bfloat16, loses the mantissa's carry (and does not
saturate) on the way to fp8, and multiplies raw bit patterns in a bfloat16 ``tl.dot``. Here a cast
is torch's cast, bit for bit, and a dot is computed from values. Only for TRITON_INTERPRET=1.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH_TYPES = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
SATURATING = {torch.float8_e4m3fn, torch.float8_e5m2}  # cvt.rn.satfinite
BITS = {1: (np.uint8, torch.uint8), 2: (np.uint16, torch.uint16),
        4: (np.uint32, torch.uint32), 8: (np.uint64, torch.uint64)}  # fmt: skip


def _values(data: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    """The numbers that the interpreter keeps as bits or as a numpy float type."""
    bits, torch_bits = BITS[data.dtype.itemsize]
    raw = torch.from_numpy(np.ascontiguousarray(data).view(bits)).view(torch_bits)
    return raw.view(TORCH_TYPES[dtype])


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype in SATURATING:
        top = torch.finfo(dtype).max
        x = x.clamp(-top, top)  # NaN stays NaN
    return x.to(dtype)


def install() -> None:
    """Replace the interpreter's casts and dot, once a process; overflow as silently as a GPU."""
    np.seterr(all="ignore")
    stock_convert = interpreter._convert_float
    stock_dot = interpreter.InterpreterBuilder.create_dot

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> np.ndarray:
        is_default = rounding is None or rounding == interpreter._ir.ROUNDING_MODE.RTNE
        if source not in TORCH_TYPES or target not in TORCH_TYPES or not is_default:
            return stock_convert(data, source, target, rounding)
        result = _cast(_values(data, source), TORCH_TYPES[target])
        bits, torch_bits = BITS[result.element_size()]
        return result.view(torch_bits).numpy().view(bits).reshape(np.shape(data))

    def dot(builder: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return stock_dot(builder, _as_float(a), _as_float(b), d, *rest)

    def _as_float(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        values = _values(handle.data, tl.bfloat16).float().numpy().reshape(handle.data.shape)
        return interpreter.TensorHandle(values, tl.float32)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
