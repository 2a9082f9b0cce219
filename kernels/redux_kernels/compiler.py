"""Triton, or what stands in for it where it is not installed.

torch's CPU builds come without triton. The operators must still import there, to run their
references, so kernels are then left as plain functions that nobody launches.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol, overload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Kernel = Callable[..., Any]

    class _Jit(Protocol):
        @overload
        def __call__(self, kernel: Kernel, /) -> Any: ...
        @overload
        def __call__(self, *, do_not_specialize: Sequence[str]) -> Callable[[Kernel], Any]: ...

    constexpr = Any
    tensor = Any
    HAS_TRITON: bool
    tl: Any
    jit: _Jit
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

        def jit(kernel: Any = None, **options: Any) -> Any:
            """Leave a kernel as it is."""
            return (lambda each: each) if kernel is None else kernel


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` (>= 1): the size of a Triton block."""
    return 1 << (n - 1).bit_length()
