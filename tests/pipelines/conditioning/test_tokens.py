"""How conditioning becomes rows and key groups."""

import math

import pytest
import torch

from redux_pipelines.attention.groups import KeyGroup
from redux_pipelines.conditioning.tokens import Conditioning, Tokens, fold_tokens


def _tokens(rows, first=1.0, **fields):
    return Tokens(torch.arange(first, first + rows)[:, None].repeat(1, 2), **fields)


def _conditioning(txt, *redux):
    return Conditioning(txt, redux, torch.zeros(3), 3.5)


def _rows(laid_out):
    return laid_out.values[:, 0].tolist()


def test_equal_tokens_are_one_row_with_the_logarithm_of_their_number():
    rows = fold_tokens(_conditioning(_tokens(1, copies=512), _tokens(4, 10.0)), img_rows=100)
    assert _rows(rows) == [1, 10, 11, 12, 13]
    assert rows.groups == (KeyGroup(1, math.log(512)), KeyGroup(104, 0.0))


def test_tokens_that_count_once_are_one_group_with_the_image():
    rows = fold_tokens(_conditioning(_tokens(3), _tokens(4, 10.0)), img_rows=100)
    assert rows.groups == (KeyGroup(107, 0.0),)


def test_strengths_come_first_so_that_the_rest_is_one_group():
    weak = _tokens(4, 10.0, log_weight=math.log(0.5))
    rows = fold_tokens(_conditioning(_tokens(3), weak, _tokens(2, 20.0)), img_rows=100)
    assert _rows(rows) == [10, 11, 12, 13, 1, 2, 3, 20, 21]
    assert rows.groups == (KeyGroup(4, math.log(0.5)), KeyGroup(105, 0.0))


def test_copies_and_strength_add_up():
    assert _tokens(1, copies=3, log_weight=math.log(2)).key_bias == pytest.approx(math.log(6))


def test_strength_0_leaves_the_tokens_out():
    gone = _tokens(4, 10.0, log_weight=-math.inf)
    rows = fold_tokens(_conditioning(_tokens(3), gone, _tokens(1, 20.0)), img_rows=100)
    assert _rows(rows) == [1, 2, 3, 20]
    assert rows.groups == (KeyGroup(104, 0.0),)


@pytest.mark.parametrize("txt", [1, 7, 16])
def test_filling_rows_are_in_front_and_unseen(txt):
    rows = fold_tokens(_conditioning(_tokens(txt)), img_rows=32, row_multiple=16)
    filling = len(rows.values) - txt
    assert 0 <= filling < 16
    assert (len(rows.values) + 32) % 16 == 0
    assert _rows(rows)[:filling] == [0] * filling
    unseen = (KeyGroup(filling, -math.inf),) if filling else ()
    assert rows.groups == (*unseen, KeyGroup(txt + 32, 0.0))


def test_groups_cover_every_row():
    pictures = [_tokens(n, log_weight=weight) for n, weight in ((2, 1.0), (3, 1.0), (4, -2.0))]
    rows = fold_tokens(_conditioning(_tokens(1, copies=9), *pictures), 50, row_multiple=16)
    assert sum(group.rows for group in rows.groups) == len(rows.values) + 50
    assert KeyGroup(5, 1.0) in rows.groups  # neighbours of equal strength


def test_expanded_writes_every_copy_out():
    assert _tokens(2, copies=3).expanded()[:, 0].tolist() == [1, 2, 1, 2, 1, 2]
