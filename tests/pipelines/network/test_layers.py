"""The small pieces, against their definitions and diffusers' own."""

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from redux_pipelines.network.layers import (
    EPS,
    Rope,
    modulate,
    norm_rope,
    rope_table,
    timestep_embedding,
)
from redux_pipelines.sampling import Grid, image_ids


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(5, 7), Grid(96, 96)], ids=str)
@pytest.mark.parametrize("axes", [(16, 56, 56), (4, 6, 6)], ids=str)
def test_rotations_are_bitwise_those_of_diffusers(grid, axes):
    ours = rope_table(3, grid, axes)
    ids = torch.cat([torch.zeros(3, 3), image_ids(grid)])
    cos, sin = FluxPosEmbed(theta=10000, axes_dim=axes)(ids)
    sign = torch.tensor([-1.0, 1.0]).repeat(sum(axes) // 2)
    assert torch.equal(ours.cos[:, 0, 0], cos)
    assert torch.equal(ours.sin[:, 0, 0] + 0.0, sin * sign + 0.0)  # + 0: zeros have no sign
    assert ours.cos.dtype == ours.sin.dtype == torch.float32


def test_text_rows_are_not_rotated():
    table = rope_table(4, Grid(3, 3), (4, 6, 6)).rows(0, 4)
    assert (table.cos == 1).all()
    assert not table.sin.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_time_sinusoids_are_bitwise_those_of_diffusers(dtype):
    times = torch.tensor([1000.0, 937.4, 3500.0, 0.5, 0.0]).to(dtype)
    theirs = get_timestep_embedding(times, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(timestep_embedding(times), theirs)


@pytest.mark.parametrize("batch", [1, 3])
def test_norm_and_rotation_in_one_go_are_both_in_turn(batch):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, 35, 3, 2, 16, generator=generator, dtype=torch.float64)
    weight = torch.rand(2, 1, 16, generator=generator, dtype=torch.float64) + 0.5
    table = Rope(*(each.double() for each in rope_table(0, Grid(5, 7), (4, 6, 6))))
    out = torch.empty(batch, 40, 2, 2, 16, dtype=torch.float64)[:, 5:]
    norm_rope(qkv[:, :, :2], weight, table, out)
    normed = torch.nn.functional.rms_norm(qkv[:, :, :2], (16,), eps=EPS) * weight
    turns = torch.complex(table.cos[..., ::2], table.sin[..., 1::2])
    pairs = torch.view_as_complex(normed.unflatten(-1, (-1, 2)))
    expected = torch.view_as_real(pairs * turns).flatten(-2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


def test_half_precision_is_normed_and_rotated_in_float32():
    generator = torch.Generator().manual_seed(0)
    qk = torch.randn(1, 35, 2, 2, 16, generator=generator).bfloat16()
    weight, table = (
        torch.rand(2, 1, 16, generator=generator).bfloat16(),
        rope_table(0, Grid(5, 7), (4, 6, 6)),
    )
    half, exact = torch.empty_like(qk), torch.empty(qk.shape)
    norm_rope(qk, weight, table, half)
    norm_rope(qk.float(), weight.float(), table, exact)
    assert torch.equal(half, exact.bfloat16())


def test_modulation_is_the_affine_map_of_the_norm():
    generator = torch.Generator().manual_seed(0)
    x, shift, scale = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((2, 5, 24), (24,), (24,))
    )
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * scale + shift
    torch.testing.assert_close(modulate(x, shift, scale), expected, rtol=0, atol=1e-13)
