"""Attention of rows that ranks share is that of all rows."""

from math import inf, log

import pytest
import torch

from pipelines.attention_rows import qkv
from pipelines.parallel_threads import on_ranks
from redux_pipelines.attention.groups import KeyGroup, reference
from redux_pipelines.parallel.shares import RowShares
from redux_pipelines.parallel.ulysses import UlyssesAttention

TXT, IMG = 7, 18
GROUPS = (KeyGroup(2, -inf), KeyGroup(1, log(512)), KeyGroup(4, log(0.3)), KeyGroup(IMG, 0.0))


@pytest.mark.parametrize("img_only", [False, True])
@pytest.mark.parametrize("is_placed", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("ranks", [2, 4])
def test_it_is_attention_of_all_rows(tmp_path, ranks, batch, is_placed, img_only):
    shares = RowShares.of(TXT, IMG, ranks)
    q, k, v = qkv(TXT + IMG, heads=8, batch=batch, dtype=torch.float64)
    first = TXT if img_only else 0
    expected = reference(q[:, :, first:], k, v, GROUPS)

    def own_rows(rows, rank):
        txt, img = rows.tensor_split([rows.shape[2] - IMG], dim=2)
        txt = txt[:, :, shares.txt.slices[rank]] if len(txt) and txt.shape[2] else txt
        return torch.cat([txt, img[:, :, shares.img.slices[rank]]], dim=2)

    def work(group):
        own = (own_rows(each, group.rank) for each in (q[:, :, first:], k, v))
        wide = torch.full((*expected.shape[:2], IMG + TXT, 3 * expected.shape[3]), torch.nan)
        count = sum((shares.of_img() if img_only else shares).counts(group.rank))
        into = wide.to(q.dtype)[:, :, :count, : expected.shape[3]] if is_placed else None
        out = UlyssesAttention(reference, group, shares)(*own, GROUPS, into)
        assert into is None or out is into
        return out

    for rank, out in enumerate(on_ranks(tmp_path, ranks, work)):
        torch.testing.assert_close(out, own_rows(expected, rank), rtol=0, atol=1e-12)
