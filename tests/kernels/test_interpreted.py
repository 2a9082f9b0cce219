"""The kernels' numerics, without a GPU: every ``interpreted`` test, in a process of its own."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter(which: str) -> None:
    command = [sys.executable, "-m", "pytest", str(HERE), "-q", "-p", "no:cacheprovider"]
    command += ["-m", which]
    done = subprocess.run(
        command,
        cwd=HERE.parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_interpreter_casts_as_torch_does(name: str) -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def _cast_kernel(x_ptr, y_ptr, n: tl.constexpr):
        at = tl.arange(0, n)
        tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))

    bits = torch.arange(0, 2**32, 2**32 // 65536 + 7, dtype=torch.int64)[:65536]
    x = bits.to(torch.int32).view(torch.float32)
    x = torch.where(torch.isnan(x), 31.7, x)
    dtype = getattr(torch, name)
    y = torch.empty(65536, dtype=dtype)
    x = torch.nn.functional.pad(x, (0, 65536 - len(x)))
    _cast_kernel[(1,)](x, y, 65536)
    top = torch.finfo(dtype).max
    wanted = (x.clamp(-top, top) if name.startswith("float8") else x).to(dtype)
    raw = torch.uint8 if name.startswith("float8") else torch.int16
    assert torch.equal(y.view(raw), wanted.view(raw))


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("read", "write", "stride", "complaint"),
    [
        (0, 0, 8, None),
        (1, 0, 8, "reads outside its tensors at 1 addresses"),
        (0, 1, 8, "writes outside its tensors at 1 addresses"),
        (0, 0, 4, "writes an element twice"),
    ],
)
def test_interpreter_watches_memory(read, write, stride, complaint) -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def _copy_kernel(x_ptr, y_ptr, read, write, stride):
        at = tl.program_id(0) * stride + tl.arange(0, 8)
        tl.store(y_ptr + at + write, tl.load(x_ptr + at + read))

    x, y = torch.randn(16), torch.zeros(16)
    with nullcontext() if complaint is None else pytest.raises(Exception, match=complaint):
        _copy_kernel[(2,)](x, y, read, write, stride)


@pytest.mark.interpreted
def test_interpreter_forbids_to_read_what_another_program_writes() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def _reverse_kernel(x_ptr):
        at = tl.arange(0, 8)
        tl.store(x_ptr + at, tl.load(x_ptr + 7 - at))

    with pytest.raises(IndexError, match="reads what it writes"):
        _reverse_kernel[(1,)](torch.randn(8))


@pytest.mark.interpreted
def test_interpreter_multiplies_bfloat16_values() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def _dot_kernel(a_ptr, b_ptr, c_ptr, n: tl.constexpr):
        at = tl.arange(0, n)[:, None] * n + tl.arange(0, n)[None, :]
        tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))

    a, b = torch.randn(2, 16, 16, dtype=torch.bfloat16)
    c = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, c, 16)
    torch.testing.assert_close(c, a.float() @ b.float(), atol=1e-5, rtol=1e-5)
