"""Host memory is taken in powers of two, which weights fill nearly to the end."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipelines import full_size
from redux_pipelines.fp8.weights import SCALE
from redux_pipelines.loading.flux_weights import _use_fp8, fp8_layers, load_flux
from redux_pipelines.memory import host
from redux_pipelines.memory.cards import sold_as
from redux_pipelines.memory.host import ALIGNMENT, SLAB_BYTES, HostMemory, Layout, aligned
from redux_pipelines.memory.model_sizes import FLUX_DEV
from redux_pipelines.memory.offload import BlockStream, OnDemand
from redux_pipelines.memory.plan import Options, Placement, plan
from redux_pipelines.network.flux import Flux, FluxParams

CUDA, META = torch.device("cuda"), torch.device("meta")
sizes = st.lists(st.integers(0, 3 * 10**9), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(sizes, st.floats(0, 2))
def test_pieces_never_overlap(pieces, guess):
    layout = Layout(int(guess * sum(map(aligned, pieces))))
    places = [(*layout.place(size), aligned(size)) for size in pieces]
    assert all(slab & (slab - 1) == 0 for slab in layout.slabs)
    assert all(slab <= max(SLAB_BYTES, 2 * max(pieces)) for slab in layout.slabs)
    for index, slab in enumerate(layout.slabs):
        inside = sorted((start, size) for where, start, size in places if where == index)
        ends = [0, *(start + size for start, size in inside)]
        assert all(start >= end for (start, _), end in zip(inside, ends, strict=False))
        assert ends[-1] <= slab
        assert all(start % ALIGNMENT == 0 for start, _ in inside)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 2**20), min_size=40, max_size=80))
def test_many_small_pieces_that_were_announced_leave_little_over(pieces):
    expected = sum(map(aligned, pieces))
    layout = Layout(expected)
    for size in pieces:
        layout.place(size)
    assert sum(layout.slabs) <= 1.25 * expected + 2**20


def test_slabs_come_as_they_are_needed():
    memory = HostMemory(3 * 1024, pinned=False)
    assert memory._slabs == []
    first, second, third = (memory.take(1024) for _ in range(3))
    assert first.slab is second.slab
    assert third.slab is not first.slab
    assert [len(each) for each in memory._slabs] == [2048, 1024]
    first.tensor(torch.float32, torch.Size((256,))).fill_(1.0)
    assert (
        second.tensor(torch.uint8, torch.Size((1024,))).data_ptr() == first.slab.data_ptr() + 1024
    )


# --- FLUX.1 ---------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """Sizes that were asked of the allocator, which gives what has no bytes.

    They are rounded up as torch's page-locked ones are.
    """
    sizes = []

    def allocate(size_bytes, *, pinned):
        sizes.append(1 << (size_bytes - 1).bit_length())
        return torch.empty(size_bytes, dtype=torch.uint8, device=META)

    monkeypatch.setattr(host, "_allocate", allocate)
    return sizes


def _blocks(params, *, is_fp8):
    with META:
        flux = Flux(params).bfloat16()
        if is_fp8:
            _use_fp8(flux, {f"{layer}{SCALE}" for layer in fp8_layers(params)})
    return flux.requires_grad_(False).blocks


@cache
def _transformer():
    return full_size.on_meta("transformer").bfloat16()


@pytest.mark.parametrize("is_fp8", [False, True], ids=["bfloat16", "fp8"])
@pytest.mark.parametrize("gigabytes", [10, 12, 14, 16])
def test_flux_takes_what_its_plan_says(asked, gigabytes, is_fp8):
    made = plan(FLUX_DEV, sold_as(gigabytes), Options(is_fp8=is_fp8), "offload")
    transformer = _transformer()
    params = FluxParams.of(transformer.config)
    BlockStream(_blocks(params, is_fp8=is_fp8), made.streamed_blocks, CUDA)
    taken = {"streamed blocks": sum(asked)}
    asked.clear()
    load_flux(
        params,
        transformer.state_dict(),
        device=META,
        dtype=torch.bfloat16,
        evict_modulation=True,
    )
    taken["modulation"] = sum(asked)
    for name in ("T5", "CLIP"):
        asked.clear()
        encoder = full_size.on_meta(name).bfloat16().requires_grad_(False)
        OnDemand(encoder, CUDA, encoder.encoder.block if name == "T5" else ())
        taken[name] = sum(asked)
    asked.clear()
    vision = [full_size.on_meta(name).bfloat16() for name in ("SigLIP", "Redux")]
    OnDemand(nn.ModuleList(vision).requires_grad_(False), CUDA)
    taken["SigLIP"] = sum(asked)
    on_host = {p.name: p.size_bytes for p in made.parts if p.placement is not Placement.GPU}
    on_host["SigLIP"] += on_host.pop("Redux")
    assert on_host.keys() == taken.keys()
    assert all(size_bytes <= taken[name] for name, size_bytes in on_host.items())
    assert sum(taken.values()) <= made.host_bytes
