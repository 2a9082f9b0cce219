"""Attention over rows that several ranks hold: DeepSpeed-Ulysses (arXiv:2309.14509).

A rank comes with its rows of all heads, gets all rows of its heads from the others in one exchange,
attends as one process would, for fewer heads, and gives the result back in another. All keys of a
head are then in one place, in the order in which they would be in one process, so groups of keys
and their biases stay as they are. Knows no network and no processes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from redux_pipelines.attention.groups import Attention, Groups
from redux_pipelines.parallel.group import Group
from redux_pipelines.parallel.shares import RowShares


@dataclass(frozen=True, slots=True)
class UlyssesAttention:
    """``attention`` of all ranks of ``group`` together; ``rows`` says which of them has which.

    An ``Attention`` of a rank's own rows, text first; ``groups`` are those of all keys. Queries may
    be those of the image alone. Heads have to divide among the ranks.
    """

    attention: Attention
    group: Group
    rows: RowShares

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, groups: Groups, into: Tensor | None = None
    ) -> Tensor:
        """``q (B, heads, Q, D)``, ``k`` and ``v (B, heads, S, D)`` of our rows to their output."""
        queries = self.rows if q.shape[2] == k.shape[2] else self.rows.of_img()
        q, k, v = self._to_heads((q, k, v), (queries, self.rows, self.rows))
        return self._to_rows(self.attention(q, k, v, groups), queries, into)

    def _to_heads(
        self, parts: tuple[Tensor, ...], shares: tuple[RowShares, ...]
    ) -> tuple[Tensor, ...]:
        """Our heads ``(B, heads / ranks, rows, D)`` of each part, from all ranks.

        In what is sent rows come before images, so that a share of rows is in one piece.
        """
        ranks, own = self.group.ranks, [part.shape[2] for part in parts]
        batch, heads, _, width = parts[0].shape
        send = parts[0].new_empty(ranks, sum(own), batch, heads // ranks, width)
        for room, part in zip(torch.split(send, own, dim=1), parts, strict=True):
            by_rank = part.view(batch, ranks, heads // ranks, -1, width)
            room.copy_(by_rank.permute(1, 3, 0, 2, 4))
        size = send[0, 0].numel()
        counts = [[n for each in shares for n in each.counts(rank)] for rank in range(ranks)]
        received = self.group.exchange(
            send, [sum(own) * size] * ranks, [sum(each) * size for each in counts]
        ).view(-1, *send.shape[2:])
        pieces, kinds = torch.split(received, [n for each in counts for n in each]), len(counts[0])
        return tuple(
            torch.cat([*pieces[txt::kinds], *pieces[txt + 1 :: kinds]]).permute(1, 2, 0, 3)
            for txt in range(0, kinds, 2)
        )

    def _to_rows(self, out: Tensor, shares: RowShares, into: Tensor | None) -> Tensor:
        """``out (B, heads / ranks, all queries, D)`` to all heads of our queries."""
        ranks, (batch, heads, _, width) = self.group.ranks, out.shape
        end = sum(shares.txt.counts)
        txt, img = out.permute(2, 0, 1, 3).tensor_split([end])
        pairs = zip(shares.txt.slices, shares.img.slices, strict=True)
        send = torch.cat([part for t, i in pairs for part in (txt[t], img[i])])
        size = send[0].numel()
        counts = [sum(shares.counts(rank)) for rank in range(ranks)]
        own = counts[self.group.rank]
        received = self.group.exchange(send, [n * size for n in counts], [own * size] * ranks)
        if into is None:  # rows before heads, as the next linear reads them
            into = out.new_empty(batch, own, ranks * heads, width).transpose(1, 2)
        by_rank = received.view(ranks, own, batch, heads, width).permute(2, 0, 3, 1, 4)
        into.view(batch, ranks, heads, own, width).copy_(by_rank)
        return into
