"""FLUX.1-dev's parameters, operations and live activations, held to a record and to other sources.

Written anew by ``record.py``.
"""

import gc
import json

import pytest
import torch

from codegen import record, sizes
from live_bytes import LiveBytes

EQUAL = ("parameters", "operations")


@pytest.fixture(scope="module")
def recorded():
    return json.loads(record.RECORD.read_text())["sizes"]


@pytest.mark.parametrize("name", sizes.MEASURED)
def test_size_is_the_recorded_one(name, recorded):
    now = sizes.MEASURED[name]()
    if name.startswith(EQUAL):
        assert now == recorded[name]
    else:
        assert now <= recorded[name], "more is alive at once than there was"


def test_record_holds_every_size_and_nothing_else(recorded):
    assert set(recorded) == set(sizes.MEASURED)


def test_ours_has_the_parameters_of_diffusers(recorded):
    assert recorded["parameters, ours"] == recorded["parameters, diffusers"] == 11_901_408_320


HIDDEN, IMAGE, TEXT = 3072, 4096, 1241
ROWS = IMAGE + TEXT


def test_operations_of_diffusers_are_those_of_the_formula(recorded):
    """12 H² weights a row in either kind of block, and attention of all rows to all."""
    linears = 57 * 2 * 12 * HIDDEN**2 * ROWS
    attention = 57 * 4 * ROWS**2 * HIDDEN
    assert recorded["operations, diffusers"] == pytest.approx(linears + attention, rel=1e-3)


def test_ours_saves_the_last_blocks_text_rows_and_what_is_done_once(recorded):
    """Of text rows the last block leaves out MLP and output: 9 of 12 H² weights, and attention."""
    last = 2 * 9 * HIDDEN**2 * TEXT + 4 * TEXT * ROWS * HIDDEN
    once = 2 * TEXT * 4096 * HIDDEN + 2 * 3_247_448_064  # text's embedding, modulations
    saved = recorded["operations, diffusers"] - recorded["operations, ours"]
    assert saved == pytest.approx(last + once, rel=1e-3)
    assert recorded["operations, ours, folded"] < 0.9 * recorded["operations, ours"]


def test_live_bytes_are_those_alive_at_once():
    with LiveBytes() as live:
        first = torch.empty(1000, dtype=torch.uint8)
        assert live.now == 1000
        view = first[10:]
        del first
        gc.collect()
        assert live.now == 1000  # the view keeps it
        second = torch.empty(500, dtype=torch.uint8)
        view += 1  # in place
        del view
        gc.collect()
        assert live.now == 500
        third = second.clone()
    assert live.peak == 1500
    del second, third
    gc.collect()
    assert live.now == 0
