"""Plain torch, oneDNN and the kernels (their references, on a CPU) compute the same."""

import weakref
from itertools import product

import pytest
import torch

from fp8_products import needs_fp8
from pipelines.networks import SCHEDULE, conditioning, diffusers_model, engine, error, noise
from redux_kernels.reference import quantize_rows
from redux_pipelines.fp8 import linear as linear_module
from redux_pipelines.fp8.linear import ALL, Fp8Linear, project
from redux_pipelines.network.layers import rope_table
from redux_pipelines.network.onednn_operators import OneDnnOperators
from redux_pipelines.network.operators import KernelOperators, Residual, TorchOperators
from redux_pipelines.sampling import Grid

CPU, HEADS, WIDTH, ROWS = torch.device("cpu"), 3, 48, 7
TORCH, KERNELS, ONEDNN = TorchOperators(), KernelOperators(), OneDnnOperators()


def kinds(*, fp8):
    """Those that take such layers."""
    return (KERNELS, TORCH) if fp8 else (KERNELS, TORCH, ONEDNN)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(columns, out=WIDTH, *, fp8=False):
    layer = torch.nn.Linear(columns, out)
    return Fp8Linear.of(layer.weight.detach(), layer.bias.detach()) if fp8 else layer


def near(one, other):
    """Within what rounding to e4m3 differently costs."""
    assert (one - other).norm() <= 0.01 * other.norm()


def close(one, other):
    torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)


KINDS = pytest.mark.parametrize(
    ("fp8", "check"),
    [(False, close), pytest.param(True, near, marks=needs_fp8)],
    ids=["plain", "fp8"],
)


@pytest.mark.parametrize("pending", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@KINDS
@torch.no_grad()
def test_normed_linear(pending, batch, fp8, check):
    layer = linear(WIDTH, 2 * WIDTH, fp8=fp8)
    x, y, gate = draw(batch, ROWS, WIDTH), draw(batch, ROWS, WIDTH, seed=1), draw(WIDTH, seed=2)
    shift, scale = draw(2, WIDTH, seed=3)
    settled = torch.addcmul(x, gate, y) if pending else x.clone()
    norm = torch.nn.functional.layer_norm(settled, (WIDTH,), eps=1e-6) * (1 + scale) + shift

    for ops, rows in product(kinds(fp8=fp8), (ALL, slice(16, 32))):
        own = Residual(x.clone(), y, gate) if pending else Residual(x.clone())
        out, h = ops.normed_linear(own, shift, scale + ops.scale_offset, layer, rows)
        close(out, settled)
        check(h, project(layer, norm, rows))


@KINDS
@torch.no_grad()
def test_linear_of_rows_that_lie_apart(fp8, check):
    layer, x = linear(WIDTH, 2 * WIDTH, fp8=fp8), draw(2, ROWS + 3, WIDTH)[:, 3:]
    weight = layer.weight.float() * layer.weight_scale if fp8 else layer.weight
    expected = torch.nn.functional.linear(x, weight, layer.bias)
    for ops in kinds(fp8=fp8):
        before, got = x.clone(), ops.linear(x, layer)
        check(got, project(layer, x))
        assert error(got, expected) <= (0.04 if fp8 else 1e-6)  # measured in fp8: .026
        assert torch.equal(x, before)


def in_fp8(flux):
    """``flux`` with every linear layer of its blocks in fp8."""
    for name, layer in list(flux.named_modules()):
        if isinstance(layer, torch.nn.Linear) and "_blocks." in name:
            parent, _, own = name.rpartition(".")
            setattr(flux.get_submodule(parent), own, Fp8Linear.of(layer.weight, layer.bias))
    return flux


@torch.no_grad()
@needs_fp8
def test_in_fp8_the_kernels_leave_no_rows_to_plain_torch(monkeypatch):
    """Whatever a block's linear layers are given comes quantised from an operator of ours."""
    left = []
    monkeypatch.setattr(
        linear_module, "quantize_rows", lambda x: left.append(x) or quantize_rows(x)
    )
    model, outputs = diffusers_model(num_layers=1, num_single_layers=2), []
    for ops in (KERNELS, TORCH):
        left.clear()
        denoiser = engine(model, operators=ops)
        assert in_fp8(denoiser.flux).has_fp8
        prepared = denoiser.prepare(conditioning(model), SCHEDULE, Grid(4, 4))
        left.clear()
        outputs.append(prepared.predict(noise(model, Grid(4, 4)), 0))
        assert bool(left) is (ops is TORCH)
    assert error(*outputs) <= 0.03


@torch.inference_mode()
@needs_fp8
def test_quantised_rows_of_a_run_lie_in_one_memory_that_ends_with_it(monkeypatch):
    """A graph that is captured must not write to what belongs to an earlier step."""
    product, seen, reused = Fp8Linear.forward_quantized, [], []

    def spy(self, q, *given):
        reused.append(any(each() is q for each in seen))
        seen.append(weakref.ref(q))
        return product(self, q, *given)

    monkeypatch.setattr(Fp8Linear, "forward_quantized", spy)
    model = diffusers_model(num_layers=2, num_single_layers=3)
    denoiser = engine(model, operators=KERNELS)
    in_fp8(denoiser.flux)
    prepared = denoiser.prepare(conditioning(model), SCHEDULE, Grid(4, 4))
    joined = denoiser.join([prepared, prepared])
    for each, batch in ((prepared, 1), (joined, 2)):
        img = noise(model, Grid(4, 4), batch)
        seen.clear()
        reused.clear()
        out = each.predict(img, 0)
        assert len(seen) == 2 * 8 + 3 * 2 + 1
        assert sum(reused) >= 8  # the rest are the first of their shape, or the first that large
        assert all(q() is None for q in seen)
        with monkeypatch.context() as patch:
            patch.setattr(KernelOperators, "for_run", lambda self: self)
            assert torch.equal(each.predict(img, 0), out)


def test_settle():
    x, y, gate = draw(2, ROWS, WIDTH), draw(2, ROWS, WIDTH, seed=1), draw(WIDTH, seed=2)
    expected = x + gate * y
    close(KERNELS.settle(Residual(x, y, gate)), expected)
    close(TORCH.settle(Residual(x, y, gate)), expected)
    assert TORCH.settle(Residual(x)) is x
    assert KERNELS.settle(Residual(x)) is x


def expected_heads(qkv, weight, table):
    """Of each row and head: RMSNorm, weight, and pairs turned as complex numbers."""
    q, k, v = qkv.view(2, ROWS, 3, HEADS, 16).double().permute(2, 0, 3, 1, 4)
    turns = torch.complex(table.cos[:, 0, 0, ::2], table.sin[:, 0, 0, 1::2])
    made = []
    for each, own in ((q, weight[:16]), (k, weight[16:])):
        normed = torch.nn.functional.rms_norm(each, (16,), own.double(), 1e-6)
        turned = torch.view_as_complex(normed.unflatten(-1, (8, 2))) * turns
        made.append(torch.view_as_real(turned).flatten(-2))
    return *made, v


@pytest.mark.parametrize("ops", [TORCH, KERNELS, ONEDNN], ids=lambda ops: ops.name)
@pytest.mark.parametrize("widths", [3, 7])
def test_heads_are_placed_among_rows_of_others(ops, widths):
    table = rope_table(3, Grid(2, 2), (4, 6, 6))
    qkv, weight = draw(2, ROWS, 3 * WIDTH), draw(32, seed=1)
    heads = ops.new_heads(draw(2, 1, WIDTH), ROWS + 5, HEADS, widths)
    before = [each.zero_() for each in (heads.q, heads.k, heads.v)]
    assert all(each.shape == (2, HEADS, ROWS + 5, 16) for each in before)
    ops.place_heads(qkv, weight, ops.rotation(table), heads, 5)
    for got, want in zip((heads.q, heads.k, heads.v), expected_heads(qkv, weight, table),
                         strict=True):  # fmt: skip
        torch.testing.assert_close(got[:, :, 5:], want.float(), atol=2e-6, rtol=1e-5)
        assert not got[:, :, :5].any()


@pytest.mark.parametrize("ops", [TORCH, KERNELS, ONEDNN], ids=lambda ops: ops.name)
def test_heads_of_a_single_block_leave_the_mlp_as_it_is(ops):
    table = rope_table(3, Grid(2, 2), (4, 6, 6))
    up, weight = draw(2, ROWS, 7 * WIDTH), draw(32, seed=1)
    want = expected_heads(up[..., : 3 * WIDTH].clone(), weight, table)
    values_and_mlp = up[..., 2 * WIDTH :].clone()
    heads = ops.single_heads(up[..., : 3 * WIDTH], weight, ops.rotation(table), HEADS)
    for got, each in zip((heads.q, heads.k, heads.v), want, strict=True):
        torch.testing.assert_close(got, each.float(), atol=2e-6, rtol=1e-5)
    assert torch.equal(up[..., 2 * WIDTH :], values_and_mlp)


@KINDS
@torch.no_grad()
def test_normed_mlp(fp8, check):
    up, down = linear(WIDTH, 4 * WIDTH, fp8=fp8), linear(4 * WIDTH, fp8=fp8)
    x, (shift, scale) = draw(2, ROWS, WIDTH), draw(2, WIDTH, seed=3)
    norm = torch.nn.functional.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift
    expected = down(torch.nn.functional.gelu(up(norm), approximate="tanh"))
    for ops in kinds(fp8=fp8):
        settled, y = ops.normed_mlp(Residual(x.clone()), shift, scale + ops.scale_offset, up, down)
        close(settled, x)
        check(y, expected)


@KINDS
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_single_in_and_out_join_attention_and_mlp(fp8, check, batch):
    linear1, linear2 = (
        linear(WIDTH, 7 * WIDTH, fp8=fp8),
        linear(5 * WIDTH, fp8=fp8),
    )
    x, attention = draw(batch, ROWS, WIDTH), draw(batch, ROWS, WIDTH, seed=1)
    shift, scale = draw(2, WIDTH, seed=3)
    norm = torch.nn.functional.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift
    qkv, up = linear1(norm).split([3 * WIDTH, 4 * WIDTH], dim=-1)
    mlp = torch.nn.functional.gelu(up, approximate="tanh")
    expected = linear2(torch.cat([attention, mlp], dim=-1))
    for ops in kinds(fp8=fp8):
        rows = ops.single_in(Residual(x.clone()), shift, scale + ops.scale_offset, linear1, linear2)
        close(rows.x, x)
        check(rows.qkv, qkv)
        before = rows.qkv.clone()

        def attend(into, rows=rows, before=before):
            assert torch.equal(rows.qkv, before)  # attention reads its operands here
            places = [each.untyped_storage().data_ptr() for each in (rows.qkv, rows.mlp)]
            assert into is None or into.untyped_storage().data_ptr() not in places
            return attention if into is None else into.copy_(attention)

        check(ops.single_out(rows, attend, linear2), expected)


def test_onednn_takes_no_fp8():
    with pytest.raises(TypeError, match="layers in fp8 need TorchOperators"):
        ONEDNN.linear(draw(1, ROWS, WIDTH), linear(WIDTH, fp8=True))
