"""Every modulation of a schedule, computed at once.

The modulation depends on time, guidance and pooled text only. So all steps of a schedule are one
matrix product per weight, whose rows are the steps; the result is kept as a table, and the weights
(27 % of FLUX.1) are not needed until another schedule, guidance or prompt comes. They may then
live in host memory and pass through the device block by block. Knows no blocks and no tokens.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redux_pipelines.network.layers import MLPEmbedder, timestep_embedding

DOUBLE_ROWS = 6
"""Rows of one stream of a double block: shift, scale, gate of attention, then of the MLP."""

SINGLE_ROWS = 3
"""Rows of a single block: shift, scale, gate."""

FINAL_ROWS = 2
"""Rows of the last layer: scale, shift."""


class Modulation(Protocol):
    """All modulations of a schedule, such as a table ``(N, rows, H)`` of one for all images."""

    def __len__(self) -> int:
        """Steps."""
        ...

    def __getitem__(self, step: int, /) -> Tensor:
        """Those of a step: ``(rows, H)``, or ``(rows, B, 1, H)`` for each of B images."""
        ...


_SCALES = {DOUBLE_ROWS: (1, 4), SINGLE_ROWS: (1,), FINAL_ROWS: (0,)}


class ModulationWeights(nn.Module):
    """The embedders of time, guidance and pooled text, and all modulation layers.

    ``guidance_in`` is None for a model without guidance embedding.
    """

    def __init__(
        self, hidden_size: int, vec_in_dim: int, *, depth: int, depth_single: int, guidance: bool
    ) -> None:
        super().__init__()
        self.time_in = MLPEmbedder(256, hidden_size)
        self.guidance_in = MLPEmbedder(256, hidden_size) if guidance else None
        self.vector_in = MLPEmbedder(vec_in_dim, hidden_size)
        doubles = depth * 2 * [DOUBLE_ROWS]  # image, text, image, text, …
        counts = [*doubles, *depth_single * [SINGLE_ROWS], FINAL_ROWS]
        self.layers = nn.ModuleList(nn.Linear(hidden_size, n * hidden_size) for n in counts)

    def table(
        self, times: Tensor, guidance: Tensor, vec: Tensor, *, scale_offset: float = 1.0
    ) -> Tensor:
        """All modulations ``(N, rows, H)``: of ``times (N,)``, one guidance ``(1,)``, ``vec (P,)``.

        ``times`` and ``guidance`` are times 1000, in the model's dtype. Rows: per double block six
        of the image stream and six of the text stream, three per single block, two of the last
        layer. ``scale_offset`` is added to the scales. Computed where ``vec`` is; weights that are
        elsewhere are brought there one layer at a time.
        """
        conditioning = F.silu(self._embed(times, guidance, vec))
        rows = [_rows(layer, conditioning, scale_offset) for layer in self.layers]
        return torch.cat(rows, dim=1)

    def _embed(self, times: Tensor, guidance: Tensor, vec: Tensor) -> Tensor:
        embedded = self.time_in(timestep_embedding(times).to(vec.dtype))
        if self.guidance_in is not None:
            embedded = embedded + self.guidance_in(timestep_embedding(guidance).to(vec.dtype))
        out: Tensor = embedded + self.vector_in(vec[None])
        return out


def _rows(layer: Any, conditioning: Tensor, scale_offset: float) -> Tensor:
    """``(N, rows, H)`` of one layer, whose weights are on the device no longer than this takes."""
    device = conditioning.device
    weight, bias = (each.to(device, non_blocking=True) for each in (layer.weight, layer.bias))
    rows = F.linear(conditioning, weight, bias).view(len(conditioning), -1, layer.in_features)
    rows[:, _SCALES[rows.shape[1]]] += scale_offset
    return rows
