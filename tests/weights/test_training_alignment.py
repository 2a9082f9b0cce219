"""Attention is aligned with where a scene really shows the picture."""

from dataclasses import replace

import pytest
import torch

from redux_pipelines.sampling import Grid
from training.alignment import AlignmentLoss
from training.model import MiniModel
from training.settings import SMOKE
from training.train_model import grid_at

SIDE = SMOKE.model.encoder_grid


@pytest.fixture(scope="module")
def loss():
    return AlignmentLoss(MiniModel(SMOKE.model, 4, clip_pieces=600, t5_pieces=200))


def target(loss, grid, shown):
    """``(rows, columns, SIDE, SIDE)``: where each latent token should look."""
    return loss._target(grid, shown).view(grid.rows, grid.columns, SIDE, SIDE)


@pytest.mark.parametrize("grid", [Grid(8, 24), Grid(24, 8), Grid(8, 8)], ids=str)
def test_the_whole_picture_is_stretched_over_the_grid(loss, grid):
    looks = target(loss, grid, grid)
    assert looks[0, 0].argmax() == 0
    assert looks[-1, -1].argmax() == SIDE * SIDE - 1
    torch.testing.assert_close(looks.sum((2, 3)), torch.ones(grid.rows, grid.columns))


def test_an_icon_lies_undistorted_in_the_middle(loss):
    square = target(loss, Grid(8, 8), Grid(8, 8))
    wide = target(loss, Grid(8, 24), Grid(8, 8))
    tall = target(loss, Grid(24, 8), Grid(8, 8))
    torch.testing.assert_close(wide[:, 8:16], square)
    torch.testing.assert_close(tall[8:16], square)


def test_beside_an_icon_tokens_look_at_its_nearest_edge(loss):
    wide = target(loss, Grid(8, 24), Grid(8, 8))
    assert (wide[:, :8].sum(2).argmax(-1) == 0).all()
    assert (wide[:, 16:].sum(2).argmax(-1) == SIDE - 1).all()


def test_icons_come_first_in_a_batch_and_have_a_target_of_their_own(loss):
    grid, tokens = Grid(2, 6), 12
    sizes = loss._model.sizes
    generator = torch.Generator().manual_seed(0)

    def random(rows):
        return torch.randn(3, rows, sizes.heads, sizes.head_width, generator=generator)

    keys = random(sizes.text_tokens + SIDE**2 + tokens)
    loss._pairs = [{"queries": random(tokens), "keys": keys}]
    mixed = loss(grid, 1)
    each = []
    for index, icons in ((0, 1), (1, 0), (2, 0)):
        alone = {name: value[index : index + 1] for name, value in loss._pairs[0].items()}
        single = AlignmentLoss(loss._model)
        single._pairs = [alone]
        each.append(single(grid, icons))
    torch.testing.assert_close(mixed, torch.stack(each).mean())


def test_shapes_are_drawn_by_their_shares():
    import numpy as np

    settings = replace(SMOKE.joint, shares=(0.25, 0.25, 0.5, 0.0), oblongs=((8, 12), (9, 11)))
    rng = np.random.default_rng(0)
    drawn = [grid_at(rng, 0.9, settings) for _ in range(400)]
    sides = {(grid.rows, grid.columns) for grid in drawn}
    assert sides == {(8, 8), (10, 10), (8, 12), (12, 8), (9, 11), (11, 9)}
    assert 60 < drawn.count(Grid(8, 8)) < 140
    assert {(g.rows, g.columns) for g in (grid_at(rng, 0.1, settings) for _ in range(9))} == {
        (8, 8)
    }
