"""A rank's share of the engine: its rows through all blocks, its heads through attention.

Between two attentions every row is by itself, so a rank computes its share of the rows with the
network as it is; only attention and a step cache's decision ask the other ranks. Knows no processes
and not where rows come from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from redux_pipelines.conditioning.tokens import Conditioning
from redux_pipelines.denoising.denoiser import PreparedDenoiser
from redux_pipelines.denoising.engine import EngineDenoiser
from redux_pipelines.network.layers import Rope
from redux_pipelines.parallel.group import Group
from redux_pipelines.parallel.shares import RowShares
from redux_pipelines.parallel.ulysses import UlyssesAttention
from redux_pipelines.sampling import Grid, Schedule


@dataclass(frozen=True, slots=True)
class ShardedEngine:
    """``engine``, which nobody else uses, for a rank's rows of image and text.

    Images that its denoisers take and give are a rank's share of each: ``(B, L_rank, C)``.
    """

    engine: EngineDenoiser
    group: Group

    def __post_init__(self) -> None:
        """Every rank is to have a row of text."""
        check_heads(self.engine.flux.params.num_heads, self.group.ranks)
        self.engine.least_txt_rows = max(self.engine.least_txt_rows, self.group.ranks)

    def prepare(
        self, conditioning: Conditioning, schedule: Schedule, grid: Grid
    ) -> PreparedDenoiser:
        """As the engine does, for all rows; then keep ours. Asks no other rank."""
        whole = self.engine.prepare(conditioning, schedule, grid)
        context, group = whole.context, self.group
        shares = RowShares.of(context.txt_rows, grid.tokens, group.ranks)
        txt = whole.txt[shares.txt.slices[group.rank]]
        own = replace(
            context,
            txt=txt,
            rope=Rope(*(_own_rows(each, shares, group.rank) for each in context.rope)),
            attention=UlyssesAttention(context.attention, group, shares),
        )
        return replace(whole, txt=txt, context=own, measure=self._relative_change)

    def join(self, prepared: Sequence[PreparedDenoiser]) -> PreparedDenoiser:
        """As the engine does."""
        return self.engine.join(prepared)

    def _relative_change(self, now: Tensor, former: Tensor) -> Tensor:
        """``step_cache.relative_change`` of all rows, from each rank's: the same number on all."""
        own = [each.abs().sum(dim=(1, 2), dtype=torch.float32) for each in (now - former, former)]
        distance, norm = self.group.gather_all(torch.stack(own)).sum(dim=0)
        change: Tensor = (distance / norm).max()
        return change


def check_heads(num_heads: int, ranks: int) -> None:
    """Raise ``ValueError`` where the heads of a network cannot be shared out evenly."""
    if num_heads % ranks:
        raise ValueError(
            f"parallel={ranks} does not divide the transformer's {num_heads} attention heads: "
            "choose another number of GPUs for an image"
        )


def _own_rows(table: Tensor, shares: RowShares, rank: int) -> Tensor:
    """Those of text and image that are ours, of a table with a row for each."""
    txt_rows = sum(shares.txt.counts)
    return torch.cat(
        [table[:txt_rows][shares.txt.slices[rank]], table[txt_rows:][shares.img.slices[rank]]]
    )
