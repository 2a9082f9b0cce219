"""The map from latents to colours: fitted as it says, and the same for whoever fits it again."""

import json
import shutil

import numpy as np
import pytest
import torch

from redux_weights.embedded import find_mini
from training import preview

VAE = find_mini().base / "vae"


def test_fit_finds_a_map_that_there_is() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(500, 16, generator=generator)
    true = torch.randn(17, 3, generator=generator)
    colours = latents @ true[:-1] + true[-1]
    found = preview.fit(latents, colours)
    assert torch.allclose(found, true.double(), atol=1e-5)
    assert preview.explained(found, latents, colours) == pytest.approx(1)
    noise = colours + torch.randn(500, 3, generator=generator) * colours.std()
    assert preview.explained(found, latents, noise) < 0.7


def test_drawings_are_the_same_each_time() -> None:
    first, second = (preview.drawings(np.random.default_rng(0), 4) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (4, 3, 128, 128)
    assert -1 <= first.min() < first.max() <= 1


@pytest.mark.slow
def test_the_stored_map_is_what_the_command_makes(tmp_path) -> None:
    shutil.copytree(VAE, tmp_path / "vae")
    (tmp_path / "vae" / preview.FILE).unlink()
    assert preview.write(tmp_path / "vae") > 0.85
    made, stored = (
        json.loads((place / preview.FILE).read_text()) for place in (tmp_path / "vae", VAE)
    )
    for name in ("factors", "bias"):
        assert np.allclose(made[name], stored[name], atol=2e-3)
