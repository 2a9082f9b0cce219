"""Triton, or what stands in for it where it is not installed.

torch's CPU builds come without triton. The operators must still import there, to run their
references, so kernels are then left as plain functions that nobody launches.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    constexpr = Any
    tensor = Any
    HAS_TRITON: bool
    tl: Any
    jit: Callable[[Callable[..., Any]], Any]
else:
    try:
        import triton.language as tl
        from triton import jit
        from triton.language import constexpr, tensor

        HAS_TRITON = True
    except ImportError:
        HAS_TRITON = False
        tl = SimpleNamespace()
        constexpr = tensor = object

        def jit(kernel: Any) -> Any:
            """Leave a kernel as it is."""
            return kernel


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` (>= 1): the size of a Triton block."""
    return 1 << (n - 1).bit_length()
