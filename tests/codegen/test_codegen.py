"""The code that Inductor writes for FLUX's blocks on an H100, with no GPU, held to a record.

Fails when a block needs more launches, products, copies or bytes than it did. What is recorded for
diffusers' blocks is what torch.compile alone makes of FLUX, and what ours has to beat. Nothing
here is a time. If a change is meant, or torch is another, write the record anew: see ``record.py``.
"""

import json

import pytest
import torch
import traffic

from codegen import record
from codegen.generated import FLOAT64

MIB = 2**20


@pytest.fixture(scope="module")
def recorded():
    recorded = json.loads(record.RECORD.read_text())
    if recorded["torch"] != torch.__version__.partition("+")[0]:
        pytest.skip(f"recorded with torch {recorded['torch']}, this is {torch.__version__}")
    return recorded["code"]


@pytest.fixture(scope="module", params=[
    pytest.param("diffusers", marks=pytest.mark.slow),  # changes with torch and diffusers only
    pytest.param("operators", marks=pytest.mark.slow),  # what "ours" is made of
    "ours",
    pytest.param("ours, folded", marks=pytest.mark.slow),
])  # fmt: skip
def network(request, recorded):
    """One network's record, and its counts now."""
    pytest.importorskip("triton")
    if record.find_compiler() is None:
        pytest.skip(f"no C++ compiler ({', '.join(record.COMPILERS)})")
    return recorded[request.param], record.counted(request.param)


def test_blocks_need_no_more_than_they_did(network):
    before, now = network
    assert now["graphs"] <= before["graphs"]
    assert now["float64"] <= before["float64"]
    if before["graphs"] > 1:
        return  # its blocks could not be counted
    for kind in record.KINDS:
        grown = {key: n for key, n in now[kind].items() if n > before[kind][key]}
        assert not grown, f"{kind} block, recorded: {before[kind]}"


def test_record_of_diffusers_is_what_torch_compile_makes_of_flux(recorded):
    double, single = (recorded["diffusers"][kind] for kind in ("double", "single"))
    assert (double["launches"], double["products"], double["attentions"]) == (15, 14, 1)
    assert (single["launches"], single["products"], single["attentions"]) == (4, 6, 1)
    assert [round(block["size_bytes"] / MIB) for block in (double, single)] == [883, 568]
    assert recorded["diffusers"]["graphs"] == 1


@pytest.mark.parametrize("name", ["ours", "ours, folded"])
def test_our_blocks_are_one_graph_and_less_than_torch_compile_makes_of_diffusers(recorded, name):
    ours, theirs = recorded[name], recorded["diffusers"]
    assert ours["graphs"] == 1
    for kind in record.KINDS:
        calls = [
            sum(each[kind][key] for key in ("launches", "products", "attentions", "other_calls"))
            for each in (ours, theirs)
        ]
        assert calls[0] < calls[1]
        assert ours[kind]["launches"] <= theirs[kind]["launches"]
        assert ours[kind]["size_bytes"] < theirs[kind]["size_bytes"]


@pytest.mark.parametrize(("name", "rows", "is_folded"), [
    ("ours", 5337, False), ("ours, folded", 4832, True),
])  # fmt: skip
def test_our_blocks_move_what_their_operators_must(recorded, name, rows, is_folded):
    """And, in a single block, attention's rows once more, unless the merge puts them in place."""
    merge = traffic.merge_groups(rows, 24, 128) if is_folded else 0
    norm, gelu = traffic.gate_residual_adaln(rows, 3072), traffic.gelu_into(rows, 4 * 3072)
    copy = 0 if is_folded else 2 * 2 * rows * 3072
    expected = {
        "double": 2 * norm + traffic.qk_norm_rope(rows, 24, 128) + gelu + merge,
        "single": norm + traffic.qk_norm_rope(rows, 24, 128, copies_v=False) + gelu + merge + copy,
    }
    for kind in record.KINDS:
        assert recorded[name][kind]["size_bytes"] == pytest.approx(expected[kind], rel=1e-3)
        assert recorded[name][kind]["other_calls"] == 0


def test_performance_document_says_what_is_recorded(recorded):
    document = (record.ROOT / "docs/performance/index.md").read_text()
    whose = {"diffusers": "diffusers", "ours": "ours (5,337 rows)"}
    whose["ours, folded"] = "ours, text folded (4,832 rows)"
    for name, words in whose.items():
        for kind in record.KINDS:
            block = recorded[name][kind]
            counts = " | ".join(str(block[key]) for key in ("launches", "products", "attentions"))
            size = f"{block['size_bytes'] / MIB:.0f} MiB"
            assert f"| {kind} block, {words} | {counts} | {size} |" in document


def test_ours_computes_nothing_in_double_precision(recorded):
    assert recorded["diffusers"]["float64"], "its RoPE table is: else the search finds nothing"
    assert not recorded["ours"]["float64"]


def test_operators_are_all_that_is_launched_and_nothing_is_copied(recorded):
    """8 and 4 launches; their bytes are those of test_traffic.py."""
    double, single = (recorded["operators"][kind] for kind in ("double", "single"))
    assert (double["launches"], double["products"], double["other_calls"]) == (8, 8, 0)
    assert (single["launches"], single["products"], single["other_calls"]) == (4, 2, 0)
    assert [round(block["size_bytes"] / MIB) for block in (double, single)] == [691, 503 + 94]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("tmp0 = tl.load(p).to(tl.float64)", True),
        ("'in_ptr0': '*fp64', 'xnumel': 'i32'", True),
        ("empty_strided_cuda((8, ), (1, ), torch.float64)", True),
        ("tl.float32, '*fp32', torch.bfloat16", False),
    ],
)
def test_search_finds_double_precision(text, found):
    assert bool(FLOAT64.search(text)) is found
