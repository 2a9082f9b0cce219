"""Weights from host memory: the same results, the right order of copies, and none too many."""

import pytest
import torch
from torch import nn
from transformers import T5Config, T5EncoderModel

from fp8_products import needs_fp8
from pipelines.networks import (
    CPU,
    SCHEDULE,
    conditioning,
    diffusers_model,
    engine,
    noise,
    predict,
    small_grid,
)
from redux_pipelines.attention.choice import choose
from redux_pipelines.denoising.engine import EngineDenoiser
from redux_pipelines.fp8.weights import Quantized
from redux_pipelines.loading.components import stream_blocks
from redux_pipelines.loading.flux_weights import fp8_layers, load_flux
from redux_pipelines.memory import offload
from redux_pipelines.memory.host import HostMemory
from redux_pipelines.memory.offload import BlockStream, OnDemand, Packed, tensors_of
from redux_pipelines.memory.plan import spread
from redux_pipelines.network.flux import FluxParams
from redux_pipelines.network.operators import TorchOperators

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
COUNT = 5  # blocks of a small model: two double, three single


def _streaming(model, streamed, device=CPU, dtype=torch.float32):
    """The engine with some blocks in host memory, as ``components`` makes it."""
    params = FluxParams.of(model.config)
    flux = load_flux(
        params, model.state_dict(), device=device, dtype=dtype, streamed_blocks=streamed
    )
    stream_blocks(flux, streamed, device)
    attention = choose(device, dtype, params.head_dim).attention
    return EngineDenoiser(flux, attention, TorchOperators())


@pytest.fixture
def copies(monkeypatch):
    """The places that were fetched, as far as bytes were moved."""
    seen = []
    fetch = offload._Lane.fetch

    def spy(lane, place, packed):
        if lane._holds != place:
            seen.append(place)
        fetch(lane, place, packed)

    monkeypatch.setattr(offload._Lane, "fetch", spy)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", range(1, COUNT + 1))
def test_streamed_blocks_give_bitwise_the_same(count, dtype):
    model, grid = diffusers_model(dtype), small_grid()
    given, img = conditioning(model, copies=40), noise(model, grid, batch=2)
    resident, streaming = engine(model), _streaming(model, spread(count, COUNT), dtype=dtype)
    for step in range(SCHEDULE.steps):
        expected = predict(resident, given, grid, img, step)
        assert torch.equal(predict(streaming, given, grid, img, step), expected)


@needs_fp8
def test_streamed_blocks_in_fp8_give_bitwise_the_same():
    model = diffusers_model(torch.bfloat16)
    params = FluxParams.of(model.config)
    tensors = Quantized(model.state_dict(), fp8_layers(params), CPU)
    grid, given = small_grid(), conditioning(model, copies=40)
    img, outs = noise(model, grid), []
    for streamed in ((), range(COUNT)):
        flux = load_flux(params, tensors, device=CPU, dtype=model.dtype, streamed_blocks=streamed)
        assert flux.has_fp8
        stream_blocks(flux, streamed, CPU)
        attention = choose(CPU, model.dtype, params.head_dim).attention
        denoiser = EngineDenoiser(flux, attention, TorchOperators())
        outs.append([predict(denoiser, given, grid, img, step) for step in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_a_step_that_runs_some_blocks_only_is_the_same(model):
    grid, given = small_grid(), conditioning(model)
    img, outs = noise(model, grid), []
    for denoiser in (engine(model), _streaming(model, range(COUNT))):
        with torch.inference_mode():
            prepared = denoiser.prepare(given, SCHEDULE, grid)
            flux, mod, context = prepared.flux, prepared.modulation, prepared.context
            for step, spans in enumerate([((0, 1), (1, COUNT)), ((0, 1),), ((0, 1), (1, COUNT))]):
                x = flux.embed(img, prepared.txt)
                for span in spans:
                    x = flux.run(x, mod[step], context, *span)
                outs.append(x)
    assert all(torch.equal(a, b) for a, b in zip(outs[:3], outs[3:], strict=True))


def test_without_the_copies_the_result_is_another(model, monkeypatch):
    monkeypatch.setattr(offload._Lane, "fetch", lambda *_: None)
    grid, given = small_grid(), conditioning(model)
    img = noise(model, grid)
    wrong = predict(_streaming(model, range(COUNT)), given, grid, img)
    assert not torch.equal(wrong, predict(engine(model), given, grid, img))


def test_only_streamed_blocks_are_in_host_memory(model):
    flux = _streaming(model, (1, 4))._flux
    stream = flux.blocks_ready.__self__
    held = {id(tensor) for packed in stream._packed for tensor in packed._tensors}
    for index, block in enumerate(flux.blocks):
        assert {id(each) in held for each in block.parameters()} == {index in (1, 4)}
    lanes = {lane.memory.untyped_storage()._cdata for lane in stream._lanes}
    for index in (1, 4):
        for each in flux.blocks[index].parameters():
            assert each.untyped_storage()._cdata in lanes


def test_weights_keep_their_strides_wherever_they_are():
    """A product in fp8 takes columns that lie together, and no others."""
    torch.manual_seed(0)
    layer = nn.Module()
    wide = torch.randn(24, 6)
    layer.columns = nn.Parameter(wide.t(), requires_grad=False)
    layer.gaps = nn.Parameter(torch.randn(6, 8)[:, :5], requires_grad=False)
    blocks, before = [layer], {name: each.clone() for name, each in layer.named_parameters()}
    stream = BlockStream(blocks, [0], CPU)
    for change in (lambda: None, stream.open, lambda: stream.ready(0), stream.close):
        change()
        assert layer.columns.stride() == (1, 6)
        assert layer.gaps.is_contiguous()
        if change != stream.open:  # what is there now comes with ``ready``
            assert all(torch.equal(each, before[n]) for n, each in layer.named_parameters())


def test_buffers_are_two_of_the_largest_block_that_uses_them(model):
    flux = _streaming(model, range(COUNT))._flux
    stream = flux.blocks_ready.__self__
    largest = max(packed.size_bytes for packed in stream._packed)
    assert stream.buffer_bytes == 2 * largest


def _blocks(count=5, width=4):
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(width, width) for _ in range(count)).requires_grad_(False)


def _opened(blocks, streamed=None):
    stream = BlockStream(blocks, range(len(blocks)) if streamed is None else streamed, CPU)
    stream.open()
    return stream


def _run(stream, order):
    for index in order:
        stream.ready(index)


def test_the_next_block_comes_while_one_is_used(copies):
    stream = _opened(_blocks(4))
    stream.ready(0)
    assert copies == [0, 1]
    stream.ready(1)
    assert copies == [0, 1, 2]
    _run(stream, (2, 3))
    assert copies == [0, 1, 2, 3, 0]  # of the next round


def test_each_block_is_copied_once_a_round(copies):
    stream = _opened(_blocks(4))
    for _ in range(3):
        _run(stream, range(4))
    assert sorted(copies) == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]  # and one ahead


def test_of_an_odd_number_no_block_is_copied_more_than_once_a_round(copies):
    stream = _opened(_blocks(5))
    for _ in range(3):
        _run(stream, range(5))
    assert copies[:5] == [0, 1, 2, 3, 4]
    assert max(copies.count(index) for index in range(5)) == 3


@pytest.mark.parametrize("streamed", [(2,), (1, 3)])
def test_two_blocks_or_fewer_are_copied_once_and_for_all(copies, streamed):
    stream = _opened(_blocks(5), streamed)
    for _ in range(3):
        _run(stream, range(5))
    assert copies == list(range(len(streamed)))


@pytest.mark.parametrize("order", [(0, 2, 4), (4, 3, 2, 1, 0), (0, 0, 3), (1, 3, 0)], ids=str)
def test_blocks_may_be_left_out_and_come_in_any_order(order):
    blocks = _blocks()
    expected = [block.weight.clone() for block in blocks]
    stream = _opened(blocks)
    for _ in range(2):
        for index in order:
            stream.ready(index)
            assert torch.equal(blocks[index].weight, expected[index])


def test_closing_puts_the_weights_back():
    blocks = _blocks()
    expected = [block.weight.clone() for block in blocks]
    stream = _opened(blocks)
    _run(stream, range(3))
    stream.close()
    assert stream.buffer_bytes == 0
    assert all(torch.equal(block.weight, was) for block, was in zip(blocks, expected, strict=True))
    stream.open()
    stream.ready(4)
    assert torch.equal(blocks[4].weight, expected[4])


def test_addresses_on_the_device_never_change():
    """So a graph that was compiled or captured for a block stays valid."""
    blocks = _blocks()
    stream = _opened(blocks)
    before = [each.data_ptr() for each in blocks.parameters()]
    for _ in range(2):
        _run(stream, range(5))
    assert [each.data_ptr() for each in blocks.parameters()] == before


def _storages(tensors):
    return {each.untyped_storage()._cdata for each in tensors}


def test_weights_scattered_over_host_memory_come_in_one_piece():
    """Small ones go where an earlier slab has room, so that a module lies in several places."""
    torch.manual_seed(0)
    sizes = (1024, 300, 256, 40, 8)
    weights = [torch.randint(255, (size,), dtype=torch.uint8) for size in sizes]
    before = [each.clone() for each in weights]
    memory = HostMemory(0, pinned=False)  # expects nothing, so that every slab is a small one
    earlier = memory.take(5 * 256)  # of a slab of 8 × 256
    packed = Packed(weights, memory)
    homes = [each.untyped_storage()._cdata for each in weights]
    assert len(set(homes)) == 4
    assert homes[1] == homes[2] == earlier.slab.untyped_storage()._cdata
    assert [len(run) for _, run in packed._runs] == [1024, 3 * 256, 256, 256]
    buffer = torch.zeros(packed.size_bytes, dtype=torch.uint8)
    packed.copy_to(buffer)
    packed.bind(buffer)
    assert all(torch.equal(*pair) for pair in zip(weights, before, strict=True))
    packed.unbind()
    assert [each.untyped_storage()._cdata for each in weights] == homes


class _Odd(nn.Module):
    """Weights of several dtypes and shapes, and one used twice."""

    def __init__(self):
        super().__init__()
        self.short = nn.Parameter(torch.randn(3, 5).bfloat16(), requires_grad=False)
        self.fp8 = nn.Parameter(torch.randn(7, 3).to(torch.float8_e4m3fn), requires_grad=False)
        self.number = nn.Parameter(torch.tensor(2.5), requires_grad=False)
        self.again = self.short
        self.register_buffer("places", torch.arange(11))


def test_weights_of_any_kind_are_packed():
    module = _Odd()
    before = {name: each.clone() for name, each in module.state_dict().items()}
    packed = Packed(tensors_of(module), HostMemory(4 * 256, pinned=False))
    assert len(tensors_of(module)) == 4
    assert packed.size_bytes == 4 * 256
    assert len(_storages(tensors_of(module))) == 1
    buffer = torch.zeros(packed.size_bytes, dtype=torch.uint8)
    packed.copy_to(buffer)
    packed.bind(buffer)
    assert _storages(tensors_of(module)) == _storages([buffer])
    for name, each in module.state_dict().items():
        assert each.dtype == before[name].dtype
        assert each.shape == before[name].shape
        now, was = (tensor.reshape(-1).view(torch.uint8) for tensor in (each, before[name]))
        assert torch.equal(now, was)
    assert module.short is module.again


T5 = T5Config(
    vocab_size=50,
    d_model=32,
    d_kv=8,
    d_ff=64,
    num_layers=5,
    num_heads=4,
    feed_forward_proj="gated-gelu",
)


def test_an_encoder_on_demand_gives_bitwise_the_same():
    torch.manual_seed(0)
    encoder = T5EncoderModel(T5).eval().requires_grad_(False)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        expected = encoder(ids).last_hidden_state
        on_demand = OnDemand(encoder, CPU, encoder.encoder.block)  # made where it is used
        for _ in range(2):
            with on_demand:
                assert torch.equal(encoder(ids).last_hidden_state, expected)
    assert torch.equal(encoder(ids).last_hidden_state, expected), "in host memory it works too"


def test_an_encoder_on_demand_leaves_nothing_behind():
    encoder = T5EncoderModel(T5).eval().requires_grad_(False)
    on_demand = OnDemand(encoder, CPU, encoder.encoder.block)
    hosts = _storages(encoder.parameters())
    with on_demand:
        assert on_demand._stream.buffer_bytes > 0
        assert not hosts & _storages(encoder.parameters())
    assert on_demand._stream.buffer_bytes == 0
    assert _storages(encoder.parameters()) == hosts


def test_an_error_within_gives_the_memory_back_too():
    encoder = T5EncoderModel(T5).eval().requires_grad_(False)
    on_demand = OnDemand(encoder, CPU, encoder.encoder.block)
    with pytest.raises(IndexError, match="index out of range"), on_demand:
        encoder(torch.full((1, 4), 99))
    assert on_demand._stream.buffer_bytes == 0


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("count", [2, 3, 5])
def test_streamed_blocks_give_bitwise_the_same_on_a_gpu(count):
    """Many steps without waiting, so that a copy which came too early would be seen."""
    cuda, model = torch.device("cuda"), diffusers_model(num_attention_heads=24, seed=5)
    grid, given = small_grid(32, 32), conditioning(model, copies=40)
    img = noise(model, grid).to(cuda, torch.bfloat16)
    streamed = ((), spread(count, COUNT))
    denoisers = [_streaming(model, each, cuda, torch.bfloat16) for each in streamed]
    outs = []
    with torch.inference_mode():
        for denoiser in denoisers:
            prepared = denoiser.prepare(given, SCHEDULE, grid)
            outs.append([prepared.predict(img, step % 3) for step in range(30)])
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


@pytest.mark.gpu
@GPU
def test_streamed_weights_are_pinned_and_an_encoder_leaves_the_gpu():
    cuda = torch.device("cuda")
    encoder = T5EncoderModel(T5).eval().requires_grad_(False)
    ids = torch.arange(20)[None]
    expected = encoder(ids).last_hidden_state
    on_demand = OnDemand(encoder, cuda, encoder.encoder.block)
    assert all(each.is_pinned() for each in encoder.parameters())
    before = torch.cuda.memory_allocated()
    with torch.inference_mode(), on_demand:
        out = encoder(ids.to(cuda)).last_hidden_state.cpu()
    assert torch.cuda.memory_allocated() == before
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
