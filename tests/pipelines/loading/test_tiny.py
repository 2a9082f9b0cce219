"""The random-weight checkpoint itself."""

import time

import pytest
import torch

from redux_pipelines.loading.tiny import build_tiny
from redux_weights.layout import find_missing


@pytest.mark.parametrize("options", [{}, {"vae_factor": 8}, {"guidance": False}], ids=str)
def test_it_is_complete_small_and_built_quickly(options, tmp_path):
    begin = time.perf_counter()
    base, redux = build_tiny(tmp_path, **options)
    assert time.perf_counter() - begin < 3
    assert find_missing(base, redux) == []
    assert sum(path.stat().st_size for path in tmp_path.rglob("*")) < 3_000_000


def test_weights_follow_from_the_seed(tiny, tmp_path):
    weights = "transformer/diffusion_pytorch_model.safetensors"
    same, _ = build_tiny(tmp_path / "same")
    other, _ = build_tiny(tmp_path / "other", seed=1)
    assert (same / weights).read_bytes() == (tiny.base / weights).read_bytes()
    assert (other / weights).read_bytes() != (tiny.base / weights).read_bytes()


def test_building_leaves_the_global_generator_alone(tmp_path):
    state = torch.random.get_rng_state()
    build_tiny(tmp_path)
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_impossible_factor_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vae_factor=12"):
        build_tiny(tmp_path, vae_factor=12)
