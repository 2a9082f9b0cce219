"""The bounds are counted from the network that really runs, and the documents show those."""

import importlib
import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from redux_pipelines.attention.groups import KeyGroup, reference
from redux_pipelines.network.flux import BlockContext, Flux, FluxParams
from redux_pipelines.network.layers import Rope
from redux_pipelines.network.modulation import DOUBLE_ROWS, FINAL_ROWS, SINGLE_ROWS
from redux_pipelines.network.operators import TorchOperators

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "pipelines/benchmarks"))
    return importlib.import_module("roofline")


def test_diffusers_work_is_the_known_one(roofline):
    assert roofline.diffusers_tflop(1024) == pytest.approx(88.89, abs=0.01)


@pytest.mark.parametrize("size", [512, 1024])
@pytest.mark.parametrize("text", [1, 512])
@torch.inference_mode()
def test_a_step_is_counted_as_the_network_runs_it(roofline, size, text):
    params = FluxParams()
    img_rows, txt_rows = (size // 16) ** 2, text + roofline.PICTURE
    with torch.device("meta"):
        flux = Flux(params)
        img = torch.empty(1, img_rows, params.in_channels)
        txt = torch.empty(txt_rows, params.hidden_size)
        doubles, singles = params.depth * 2 * DOUBLE_ROWS, params.depth_single_blocks * SINGLE_ROWS
        mod = torch.empty(doubles + singles + FINAL_ROWS, params.hidden_size)
        table = torch.empty(txt_rows + img_rows, 1, 1, params.head_dim)
    groups = (KeyGroup(1, math.log(512)), KeyGroup(txt_rows + img_rows - 1, 0.0))
    context = BlockContext(txt, Rope(table, table), groups, reference, TorchOperators())
    with FlopCounterMode(display=False) as counter:
        flux(img, txt, mod, context)
    counted = counter.get_total_flops() / 1e12
    assert counted == pytest.approx(roofline.step(size, text=text).tflop, rel=1e-6)


def test_a_bound_grows_with_what_is_asked_and_shrinks_with_the_gpu(roofline):
    slow, *_, fast = roofline.GPUS
    bounds = [roofline.step(size).seconds(fast) for size in roofline.SIZES]
    assert bounds == sorted(bounds)
    work = roofline.step(1024)
    assert work.seconds(fast, fp8=True) < work.seconds(fast) < work.seconds(slow)
    assert work.seconds(fast, steps=14) == pytest.approx(work.seconds(fast) / 2)
    assert roofline.step(1024, text=512).tflop > work.tflop


def test_the_document_shows_the_tables_as_they_are_computed(roofline):
    text = (ROOT / "docs/performance/index.md").read_text()
    assert roofline.table() in text
    assert roofline.work_table() in text
