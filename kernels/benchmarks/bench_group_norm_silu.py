"""GroupNorm and SiLU of a decoder's pixels: ``python bench_group_norm_silu.py --help``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import traffic
from timing import Case, main
from torch import Tensor

from redux_kernels.group_norm_silu import group_norm_silu, group_norm_statistics

CHANNELS, GROUPS, WIDTH, EPS = 128, 32, 256, 1e-6


def cases(rows: int, device: torch.device) -> Iterator[Case]:
    """The decoder's last level: a token is 16 × 16 pixels. The replaced code finds statistics too.

    So it is timed against the pair; the statistics alone against torch's of each channel.
    """
    pixels = rows * WIDTH
    x = torch.randn(1, pixels, CHANNELS, device=device, dtype=torch.bfloat16)
    weight, bias = torch.randn(2, CHANNELS, device=device, dtype=torch.bfloat16)
    image = x.view(1, rows, WIDTH, CHANNELS).permute(0, 3, 1, 2)  # channels_last, as before a conv

    def statistics() -> tuple[Tensor, ...]:
        grouped = x.float().view(pixels, GROUPS, -1)
        var, mean = torch.var_mean(grouped, dim=(0, 2), correction=0)
        return mean[None], var[None]

    def replaced() -> Tensor:
        normed = F.silu(F.group_norm(image, GROUPS, weight, bias, EPS))
        return normed.permute(0, 2, 3, 1).reshape(x.shape)

    def pair() -> Tensor:
        return group_norm_silu(x, *group_norm_statistics(x, GROUPS), weight, bias, EPS)

    read = traffic.group_norm_statistics(pixels, CHANNELS)
    yield Case("group_norm_statistics", f"group_norm_statistics, {pixels} pixels", read,
               statistics, lambda: group_norm_statistics(x, GROUPS))  # fmt: skip
    yield Case("group_norm_silu", f"group_norm_statistics and _silu, {pixels} pixels",
               read + traffic.group_norm_silu(pixels, CHANNELS), replaced, pair)  # fmt: skip


if __name__ == "__main__":
    main("Time group_norm_silu and its statistics.", cases)
