"""Scenes show what they should: placed icons, matching inputs, and no held-out concept."""

from functools import partial

import numpy as np
import pytest
import torch

from redux_pipelines.sampling import Grid
from training import synthetic
from training.augment import compose, plain
from training.captions import caption
from training.dataset import TRAINING_PHOTOS, choose_held_out, load_icons, load_photos
from training.scenes import SceneSource


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    synthetic.write_icons(folder)
    synthetic.write_photos(folder / "photos")
    icons = load_icons(folder, held_out=4)
    photos = load_photos(folder / "photos", tuple(TRAINING_PHOTOS))
    return SceneSource(icons, photos, icons.training_rows, input_side=64)


def test_held_out_concepts_are_never_drawn(source):
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(40):
        seen |= set(source.draw(rng, Grid(2, 2), 16, count=16).concepts.tolist())
    assert len(seen) == len(source.icons.names) - 4
    assert not seen & source.icons.held_out


def test_an_input_shows_the_concept_of_its_target(source):
    rng = np.random.default_rng(0)
    for row in source.rows[:30]:
        other = source._input_row(rng, int(row))
        assert source.icons.concepts[other] == source.icons.concepts[row]


def test_held_out_concepts_are_the_same_everywhere():
    chosen = choose_held_out(1631)
    assert len(chosen) == 130
    assert sorted(chosen)[:3] == sorted(chosen & set(range(sorted(chosen)[2] + 1)))
    assert chosen == choose_held_out(1631)


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (3, 5)], ids=["square", "wide"])
def test_examples_have_the_sizes_asked_for(source, rows, columns):
    drawn = source.draw(np.random.default_rng(1), Grid(rows, columns), 16, count=9)
    assert drawn.targets.shape == (9, 3, 16 * rows, 16 * columns)
    assert drawn.inputs.shape == (9, 3, 64, 64)
    assert len(drawn.captions) == 9
    assert drawn.targets.abs().max() <= 1.001


def test_a_plain_placement_is_the_icon_itself(source):
    icon = source.icons.pixels[:1]
    shown = compose(icon, plain(1), 64, 64)
    colour = torch.from_numpy(icon[..., :3].copy()).permute(0, 3, 1, 2) / 127.5 - 1
    opaque = torch.from_numpy(icon[..., 3] == 255)[:, None].expand(-1, 3, -1, -1)
    torch.testing.assert_close(shown[opaque], colour[opaque], atol=1e-5, rtol=0)
    assert torch.all(shown[0, :, 0, 0] == 1)


def test_a_wide_canvas_does_not_distort(source):
    place = plain(1)
    square = compose(source.icons.pixels[:1], place, 64, 64)
    wide = compose(source.icons.pixels[:1], place, 64, 128)
    torch.testing.assert_close(wide[..., 32:96], square, atol=1e-4, rtol=0)


def test_icons_on_a_wide_canvas_are_shown_undistorted_and_other_scenes_squashed(source):
    drawn = source.draw(np.random.default_rng(2), Grid(1, 2), 64, count=60)
    resize = partial(torch.nn.functional.interpolate, mode="bilinear", antialias=True)
    squashed = resize(drawn.targets, drawn.inputs.shape[-2:])
    centre = resize(drawn.targets[..., 32:96], drawn.inputs.shape[-2:])
    icons = slice(0, len(drawn.concepts))
    assert (drawn.inputs - centre)[icons].abs().mean() < (drawn.inputs - squashed)[
        icons
    ].abs().mean()
    others = slice(len(drawn.concepts), 60)
    torch.testing.assert_close(drawn.inputs[others], squashed[others], atol=1e-4, rtol=0)


def test_captions_are_empty_or_name_the_style():
    rng = np.random.default_rng(0)
    words = [caption(rng, "3d", "red apple", (0.5, 0.25)) for _ in range(200)]
    assert 70 < words.count("") < 130
    assert any("red apple" in line.lower() and "3d" in line.lower() for line in words)
