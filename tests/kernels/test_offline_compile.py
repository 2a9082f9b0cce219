"""What the compiler makes of each kernel, for every architecture, held to a record.

Fails when a kernel needs more than it did. If that is meant, the new record is written by

    PYTHONPATH=kernels python tests/kernels/offline_compile.py
"""

import json

import pytest
import torch
import triton
from offline_compile import (
    ARCHITECTURES,
    FIRST_WITH_E4M3,
    LAUNCHERS,
    MODELS,
    RECORD,
    compiled,
    launchers,
    measure,
    measured,
    needs_e4m3,
)

from redux_kernels import adaln

EVERYWHERE = ("adaln", "biased_attention")
"""Of kernels by rows and by tiles one each, which the quick tests compile for more than one GPU."""
OF_MINI = ("adaln_quantize", "gelu_quantize, beside", "merge_groups", "qk_norm_rope")
"""Those whose rows or heads, where they are small, share a program; and of each kind one."""
FIRST_WITH_WGMMA, FIRST_WITH_TCGEN05, FIRST_WITHOUT_EITHER = 90, 100, 120
CAN_ONLY_SHRINK = ("registers", "shared_bytes", "narrow")
MOST_REGISTERS = 128  # 16 warps stay resident: 64 KiB of loads under way at 128 bytes a thread
MOST_SHARED_BYTES = 48 * 1024  # what every architecture grants without asking
TENSOR_CORES = "biased_attention"  # its tiles fill a multiprocessor
MOST_REGISTERS_OF_TILES = 255
MOST_SHARED_BYTES_OF_TILES = 99 * 1024  # what an sm_86, sm_89 or sm_120 has


def _cases():
    for label in LAUNCHERS:
        for architecture in ARCHITECTURES:
            if architecture >= FIRST_WITH_E4M3 or not needs_e4m3(label):
                marks = () if _is_quick(label, architecture) else (pytest.mark.slow,)
                name = f"{label}-sm_{architecture}".replace(" ", "-")
                yield pytest.param(label, architecture, marks=marks, id=name)


def _is_quick(label, architecture):
    """Each kernel at FLUX's sizes for Hopper, and a few of what else there is."""
    model, name = label.split(" ", 1)
    if model == "mini":
        return architecture == 90 and name in OF_MINI
    return architecture == 90 or (architecture in (80, 120) and name in EVERYWHERE)


CASES = list(_cases())


def matrix_instruction(architecture):
    """Warp groups' on Hopper, tensor memory's on data-centre Blackwell, else warps'."""
    if FIRST_WITH_TCGEN05 <= architecture < FIRST_WITHOUT_EITHER:
        return "UTCHMMA"
    return "HGMMA" if architecture == FIRST_WITH_WGMMA else "HMMA"


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text())


@pytest.mark.parametrize(("label", "architecture"), CASES)
def test_kernel_neither_spills_nor_grows(label, architecture, record):
    now = measured(label, architecture)
    assert now["stack"] == now["local_instructions"] == 0, "spills, or an array in local memory"
    assert now["float64"] == 0
    is_of_tiles = label.endswith(TENSOR_CORES)
    assert now["registers"] <= (MOST_REGISTERS_OF_TILES if is_of_tiles else MOST_REGISTERS)
    assert now["shared_bytes"] <= (MOST_SHARED_BYTES_OF_TILES if is_of_tiles else MOST_SHARED_BYTES)
    assert now["mma"] == ([matrix_instruction(architecture)] if is_of_tiles else [])
    assert now["wide"] > 0
    if label.startswith("flux"):
        assert 16 * now["wide"] > 3 * 4 * now["narrow"], "rows are not read 128 bits at a time"
    if record["triton"] != triton.__version__:
        pytest.skip(f"recorded with triton {record['triton']}, this is {triton.__version__}")
    before = record[label][f"sm_{architecture}"]
    assert now["grid"] == before["grid"]
    grown = {name: now[name] for name in CAN_ONLY_SHRINK if now[name] > before[name]}
    assert not grown, f"recorded: {before}"


def test_record_holds_every_kernel_and_nothing_else(record):
    record = {label: by_arch for label, by_arch in record.items() if label != "triton"}
    wanted = {(label, f"sm_{architecture}") for label, architecture in (p.values for p in CASES)}
    assert wanted == {(label, arch) for label, by_arch in record.items() for arch in by_arch}


def test_rows_that_are_not_aligned_would_be_caught():
    """Rows that start at odd elements cannot be read 128 bits at a time."""
    rows, heads, d = MODELS["mini"]
    width = heads * d
    x = torch.empty(1, rows, width + 1, dtype=torch.bfloat16)[..., 1:]
    vector = torch.empty(1, width, dtype=torch.bfloat16)
    with compiled(90) as launches:
        adaln.launch(x, vector, vector, 1e-6)
    assert measure(launches[0].compiled)["narrow"] > 30


@pytest.mark.parametrize("name", sorted({label.split(" ", 1)[1] for label in LAUNCHERS}))
def test_one_binary_serves_every_number_of_rows(name):
    """A new picture size must not wait for the compiler."""
    hashes = set()
    for rows in (1, 16, 1241):
        with compiled(90) as launches:
            launchers(rows, 4, 64)[name]()
        hashes.add(launches[0].compiled.hash)
    assert len(hashes) == 1


def _refused():
    """The quick tests take the last architecture without, and one model's sizes."""
    for label in filter(needs_e4m3, LAUNCHERS):
        for architecture in ARCHITECTURES[: ARCHITECTURES.index(FIRST_WITH_E4M3)]:
            is_quick = label.startswith("mini") and architecture == 86
            yield pytest.param(label, architecture, marks=() if is_quick else pytest.mark.slow)


@pytest.mark.parametrize(("label", "architecture"), list(_refused()))
def test_e4m3_does_not_compile_where_dispatch_refuses_it(label, architecture, capfd):
    with compiled(architecture), pytest.raises(Exception, match=r"fp8e4nv|PassManager"):
        LAUNCHERS[label]()
    capfd.readouterr()  # the compiler's own complaint
