"""Which dtypes a device computes fast. Knows no model."""

import torch

_BFLOAT16_SINCE = (8, 0)  # compute capability


def slow_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``dtype`` is slow on ``device`` and what to use instead, or None."""
    if dtype != torch.bfloat16 or has_fast_bfloat16(device):
        return None
    if device.type == "cpu":
        return (
            "this CPU has no instructions for bfloat16 (AVX-512, AMX or Arm's), so that it is far "
            "slower than float32: use --dtype float32"
        )
    return f"{device} has no bfloat16 units, so it is slow; try --dtype float16"


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 have kernels of their own there.

    On other CPUs torch multiplies them one by one, a hundred times slower than float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _BFLOAT16_SINCE
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
