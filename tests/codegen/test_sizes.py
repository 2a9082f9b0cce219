"""FLUX.1-dev's parameters, operations and live activations, held to a record and to other sources.

Written anew by ``record.py``.
"""

import gc
import json

import pytest
import torch

from codegen import record, sizes
from live_bytes import LiveBytes
from redux_pipelines.attention import groups as groups_module

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


@pytest.mark.parametrize(("name", "parts"), [("2 groups", 1), ("3 groups", 2), ("5 groups", 4)])
def test_groups_are_merged_in_one_launch_that_reads_and_writes_each_row_once(
    recorded, name, parts
):  # fmt: skip
    """Outputs and log-sum-exps of all groups with several keys, the queries, the result."""
    rows = sum(group.rows for group in sizes.GROUPS[name])
    assert rows % 16 == 0
    expected = rows * ((parts + 2) * HIDDEN * 2 + parts * 24 * 4)
    assert recorded[f"bytes, merging {name}"] == expected
    assert recorded[f"launches, merging {name}"] == 1


def test_performance_document_says_what_merging_costs(recorded):
    document = (record.ROOT / "docs/performance/index.md").read_text()
    for name, groups in sizes.GROUPS.items():
        theirs = sizes.merging(groups, groups_module._merged_by_torch)
        ours = f"1, {recorded[f'bytes, merging {name}'] / 2**20:.0f} MiB"
        in_torch = f"{theirs.launches}, {theirs.size_bytes / 2**20:.0f} MiB"
        assert f"| {ours} | {in_torch} |" in document


def test_plain_torch_would_move_several_times_as_much(recorded):
    theirs = sizes.merging(sizes.GROUPS["3 groups"], groups_module._merged_by_torch)
    assert theirs.launches > 10
    assert theirs.size_bytes > 4 * recorded["bytes, merging 3 groups"]


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
