"""What is loaded where: plans for this machine's devices, and pipelines that run by them."""

import logging
import shutil

import numpy as np
import pytest
import torch

from redux_pipelines.contract.types import LoadOptions
from redux_pipelines.errors import MemoryPlanError, RequestError
from redux_pipelines.loading import components
from redux_pipelines.loading.components import plan_here
from redux_pipelines.loading.load import load_pipeline
from redux_pipelines.memory.cards import Card
from redux_pipelines.memory.model_sizes import FLUX_DEV
from redux_pipelines.memory.offload import OnDemand
from redux_pipelines.memory.plan import Placement

MODES = ("resident", "evict", "offload")
PROMPTS = ("", "a fox")


def _plan(memory="auto", backend="engine", device="cpu", batch=1, is_fp8=False):
    how = LoadOptions(memory=memory, backend=backend, max_batch_size=batch)
    kind = torch.bfloat16
    return plan_here(FLUX_DEV, how, device=torch.device(device), dtype=kind, is_fp8=is_fp8)


@pytest.fixture
def gpu_of(monkeypatch):
    """Let the first GPU have so many bytes to use."""

    def build(budget_bytes):
        monkeypatch.setattr(components, "card_of", lambda device: Card(str(device), budget_bytes))

    return build


@pytest.mark.parametrize("backend", ["engine", "diffusers"])
def test_on_a_cpu_auto_is_resident_and_not_worth_a_word(backend, caplog):
    with caplog.at_level(logging.DEBUG, "redux_pipelines"):
        made = _plan(backend=backend)
    assert made.mode == "resident"
    assert all(part.placement is Placement.GPU for part in made.parts)
    assert not caplog.records


def test_on_a_cpu_a_mode_that_is_asked_for_does_all_it_can():
    made = _plan("offload")
    assert made.streamed_blocks == tuple(range(57))
    assert _plan("evict").placement_of("T5") is Placement.STREAMED


def test_on_a_gpu_the_plan_is_that_of_what_is_free_and_in_the_log(gpu_of, caplog):
    gpu_of(22 * 10**9)
    with caplog.at_level(logging.INFO, "redux_pipelines"):
        made = _plan(device="cuda:0")
    assert (made.mode, made.placement_of("T5")) == ("evict", Placement.STREAMED)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "memory plan: bfloat16, evict: 18.9 GB on the GPU" in record.message
    assert "T5: 9.5 GB, streamed" in record.message


def test_cuda_graphs_are_planned_for_where_they_can_be(gpu_of):
    gpu_of(80 * 10**9)
    how = {"dtype": torch.bfloat16, "is_fp8": False}
    for backend, device, is_planned in (
        ("engine", "cuda", True),
        ("engine", "cpu", False),
        ("diffusers", "cuda", False),
    ):
        options = LoadOptions(backend=backend, cuda_graphs="auto")
        made = plan_here(FLUX_DEV, options, device=torch.device(device), **how)
        assert (made.graphs is not None) == is_planned
    assert _plan(device="cuda").graphs is None


def test_fp8_weights_are_planned_for(gpu_of):
    gpu_of(14 * 10**9)
    assert _plan(device="cuda").mode == "offload"
    assert _plan(device="cuda", is_fp8=True).mode == "evict"


def test_larger_batches_are_planned_for(gpu_of):
    gpu_of(22 * 10**9)
    assert _plan(device="cuda", batch=4).mode == "offload"


def test_a_plan_that_is_too_large_for_the_gpu_is_a_warning(gpu_of, caplog):
    gpu_of(22 * 10**9)
    with caplog.at_level(logging.INFO, "redux_pipelines"):
        made = _plan("resident", device="cuda:0")
    assert made.mode == "resident"
    assert caplog.records[-1].levelno == logging.WARNING
    assert "15.1 GB more than cuda:0 has" in caplog.records[-1].message


def test_diffusers_is_resident_whatever_is_free(gpu_of):
    gpu_of(22 * 10**9)
    assert _plan(backend="diffusers", device="cuda").mode == "resident"


def test_a_gpu_on_which_nothing_fits_is_refused(gpu_of):
    gpu_of(10**9)
    with pytest.raises(MemoryPlanError, match=r"cuda:0 has 1\.0 GB to use"):
        _plan(device="cuda:0")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"memory": "swap"}, "memory='swap' is not one of 'auto', 'resident', 'evict', 'offload'"),
        ({"memory": "evict", "backend": "diffusers"}, "memory='evict' needs backend='engine'"),
    ],
    ids=str,
)
def test_modes_that_cannot_be_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        load_pipeline(model="tiny", device="cpu", **options)


def _pictures(pipeline, request_for, finish):
    requests = [request_for(prompt=prompt) for prompt in PROMPTS]
    return [np.asarray(finish(pipeline.generate(each)).images[0]) for each in requests]


@pytest.mark.parametrize(
    ("model", "dtype"), [("tiny", "float32"), ("tiny", "bfloat16"), ("mini", "float32")]
)
def test_every_mode_gives_bitwise_the_same_pictures(model, dtype, request_for, finish):
    pictures = {
        mode: _pictures(
            load_pipeline(model=model, device="cpu", dtype=dtype, memory=mode), request_for, finish
        )
        for mode in MODES
    }
    for mode in MODES[1:]:
        for ours, resident in zip(pictures[mode], pictures["resident"], strict=True):
            assert np.array_equal(ours, resident), mode


def test_offload_has_everything_but_the_autoencoder_in_host_memory(tiny, load):
    parts = load(tiny, memory="offload")._components
    flux = parts.denoiser._flux
    assert flux.blocks_ready is not None
    assert len(parts.plan.streamed_blocks) == len(flux.blocks)
    assert isinstance(parts.image_encoder._presence, OnDemand)
    parts.text_encoders.load()
    encoders = parts.text_encoders
    assert isinstance(encoders._clip[2], OnDemand)
    assert isinstance(encoders._t5[2], OnDemand)


def test_a_gpu_that_is_full_while_loading_is_not_blamed_on_the_files(tiny, load, monkeypatch):
    def full(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nMore of it")

    monkeypatch.setattr("redux_pipelines.loading.components.load_flux", full)
    with pytest.raises(MemoryPlanError, match=r"choose memory='auto', .*Tried .* 1 GiB\.\)$"):
        load(tiny)


def test_resident_streams_nothing(tiny, load):
    parts = load(tiny)._components
    assert parts.plan.mode == "resident"
    assert parts.denoiser._flux.blocks_ready is None
    parts.text_encoders.load()
    assert not isinstance(parts.text_encoders._t5[2], OnDemand)


def test_without_text_encoders_offload_works_and_a_prompt_is_refused(
    tiny, load, request_for, finish, tmp_path
):
    base = shutil.copytree(tiny.base, tmp_path / "base")
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(base / name)
    pipeline = load(type(tiny)(base, tiny.redux), memory="offload")
    assert finish(pipeline.generate(request_for())).images
    with pytest.raises(RequestError, match="without text encoders"):
        pipeline.generate(request_for(prompt="a fox"))
