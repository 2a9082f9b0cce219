"""Rows are shared out evenly, in order, and none is lost."""

import pytest

from redux_pipelines.parallel.shares import RowShares, Shares


@pytest.mark.parametrize(
    ("rows", "ranks", "counts"), [(8, 2, (4, 4)), (7, 2, (4, 3)), (730, 4, (183, 183, 182, 182))]
)
def test_shares_differ_by_one_row_at_most(rows, ranks, counts):
    assert Shares.of(rows, ranks).counts == counts


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("rows", [4, 5, 6, 7, 25])
def test_slices_are_all_rows_in_order(rows, ranks):
    slices = Shares.of(rows, ranks).slices
    assert [row for each in slices for row in range(rows)[each]] == list(range(rows))


def test_every_rank_needs_a_row_of_each_kind():
    with pytest.raises(ValueError, match="3 rows of text and 9 of image are too few for 4 ranks"):
        RowShares.of(3, 9, 4)


def test_those_of_the_image_have_no_text():
    shares = RowShares.of(5, 9, 2).of_img()
    assert [shares.counts(rank) for rank in range(2)] == [(0, 5), (0, 4)]
