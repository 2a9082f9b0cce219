"""The flash libraries as their documentation describes them: recording stand-ins, and broken ones.

A stand-in computes on the CPU, takes the parameters of the real function and no others, and insists
on the layout that the real one takes without copying.
"""

import math
import sys
from types import ModuleType

import pytest
import torch

from redux_kernels.registration import overload_of
from redux_pipelines.attention import flash_libraries
from redux_pipelines.attention.flash_libraries import FLASH2, FLASH3, FLASH3_HUB, FLASH4
from redux_pipelines.attention.groups import KeyGroup, reference

CPU = torch.device("cpu")
LIBRARIES = [FLASH2, FLASH3, FLASH3_HUB, FLASH4]
GROUPS = (KeyGroup(4, -math.inf), KeyGroup(1, math.log(512)), KeyGroup(17, -1.0), KeyGroup(60, 0.0))


class Recorder:
    """Attention on (B, S, heads, D), and what it was called with."""

    def __init__(self):
        self.calls = []

    def attend(self, q, k, v, softmax_scale):
        self.calls.append((q, k, v, softmax_scale))
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
        logits = q @ k.transpose(-1, -2) * scale
        out = (logits.softmax(-1) @ v).transpose(1, 2).contiguous()
        return out.to(self.calls[-1][0].dtype), logits.logsumexp(-1)

    def flash2(
        self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        assert not dropout_p
        assert not causal
        out, lse = self.attend(q, k, v, softmax_scale)
        return (out, lse, None) if return_attn_probs else out

    def flash3(
        self, q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
        v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        assert not causal
        out, lse = self.attend(q, k, v, softmax_scale)
        return (out, lse) if return_attn_probs else out

    def flash4(
        self, q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False,
        window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
        deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None,
        aux_scalars=None, block_sparse_tensors=None, block_sparse_tensors_bwd=None,
        return_lse=False,
    ):  # fmt: skip
        assert not causal
        out, lse = self.attend(q, k, v, softmax_scale)
        return out, lse if return_lse else None


def module(name, **attributes):
    made = ModuleType(name)
    made.__dict__.update(attributes)
    return made


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch):
    """No library, and none left over from another test."""
    for name in flash_libraries._MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(flash_libraries, "_loaded", {})
    monkeypatch.setattr(sys, "meta_path", [_Nothing(), *sys.meta_path])


class _Nothing:
    """Finds none of the libraries, wherever they are."""

    def find_spec(self, name, path=None, target=None):
        if name in flash_libraries._MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


@pytest.fixture
def recorder(monkeypatch):
    """All of them installed, on top of one recorder."""
    recorder, hub = Recorder(), []

    def get_kernel(repo_id, revision=None, version=None, backend=None, user_agent=None,
                   trust_remote_code=False):  # fmt: skip
        assert (revision is None) != (version is None)
        assert not trust_remote_code
        hub.append((repo_id, version))
        return module("flash_attn3", flash_attn_func=recorder.flash3)

    recorder.hub = hub
    for name, attributes in {
        "flash_attn": {},
        "flash_attn.flash_attn_interface": {"flash_attn_func": recorder.flash2},
        "flash_attn.cute": {"flash_attn_func": recorder.flash4},
        "flash_attn_interface": {"flash_attn_func": recorder.flash3},
        "kernels": {"get_kernel": get_kernel},
    }.items():
        monkeypatch.setitem(sys.modules, name, module(name, **attributes))
    return recorder


def rows(first_query=20, dtype=torch.bfloat16):
    """q, k and v as the network has them: (B, S, 2, heads, D), and v in a wider buffer."""
    generator = torch.Generator().manual_seed(0)
    qk = torch.randn(2, 82, 2, 3, 64, generator=generator).to(dtype)
    wide = torch.randn(2, 82, 7, 3, 64, generator=generator).to(dtype)
    q, k = (each.transpose(1, 2) for each in qk.unbind(2))
    return q[:, :, first_query:], k, wide[:, :, 2].transpose(1, 2)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda each: each.name)
def test_groups_merge_to_one_softmax(library, recorder):
    assert library.make_ready(CPU, torch.float32, 64) is None
    q, k, v = rows(dtype=torch.float32)
    exact = reference(q.double(), k.double(), v.double(), GROUPS)
    torch.testing.assert_close(library(q, k, v, GROUPS).double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda each: each.name)
def test_rows_come_as_the_network_lays_them_out(library, recorder):
    """No copy: the very memory, and its strides."""
    library.make_ready(CPU, torch.bfloat16, 64)
    q, k, v = rows()
    out = library(q, k, v, GROUPS)
    assert out.transpose(1, 2).is_contiguous()
    assert [call[1].shape[1] for call in recorder.calls] == [60, 17]  # one key needs no call
    for given_q, given_k, given_v, scale in recorder.calls:
        assert given_q.shape == (2, 62, 3, 64)
        assert scale == 64**-0.5
        for given, own in ((given_q, q), (given_k, k), (given_v, v)):
            assert given.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
            assert given.stride() == own.transpose(1, 2).stride()
            assert given.stride(-1) == 1


def test_the_hub_is_asked_for_one_kernel_of_one_version(recorder):
    assert FLASH3_HUB.make_ready(CPU, torch.bfloat16, 64) is None
    assert recorder.hub == [("kernels-community/flash-attn3", 1)]
    assert "has to be asked for" in FLASH3_HUB.on_request
    assert not any(each.on_request for each in LIBRARIES if each is not FLASH3_HUB)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda each: each.name)
def test_what_is_not_installed_says_how_to_get_it(library):
    reason = library.make_ready(CPU, torch.bfloat16, 64)
    assert reason is not None
    assert reason.startswith("is not installed (")


def test_a_folder_called_kernels_is_not_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", module("kernels"))
    reason = FLASH3_HUB.make_ready(CPU, torch.bfloat16, 64)
    assert reason == "is not installed (pip install kernels)"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImportError("undefined symbol: _ZN3c10\nmore"), "ImportError: undefined symbol: _ZN3c10"),
        (OSError("libcudart.so.12: no such file"), "OSError: libcudart.so.12: no such file"),
        (RuntimeError("driver too old"), "RuntimeError: driver too old"),
        (AttributeError("no flash_attn_func"), "AttributeError: no flash_attn_func"),
        (ModuleNotFoundError("No module named 'cutlass'", name="cutlass"),
         "No module named 'cutlass'"),
    ],
    ids=lambda each: type(each).__name__,
)  # fmt: skip
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda each: each.name)
def test_a_broken_library_refuses_itself(library, error, reason, monkeypatch):
    def fail(name):
        raise error

    monkeypatch.setattr(flash_libraries.importlib, "import_module", fail)
    assert library.make_ready(CPU, torch.bfloat16, 64) == f"cannot be loaded: {reason}"


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda each: each.name)
def test_none_is_imported_where_it_cannot_run(library, monkeypatch):
    monkeypatch.setattr(
        flash_libraries.importlib, "import_module", lambda name: pytest.fail(f"imported {name}")
    )
    assert library.unfit(CPU, torch.bfloat16) == "runs on cuda, not on cpu"


def test_the_operator_is_well_formed(recorder):
    FLASH4.make_ready(CPU, torch.bfloat16, 64)
    q, k, v = (x.transpose(1, 2) for x in rows())
    torch.library.opcheck(overload_of(flash_libraries.flash_library), (q, k, v, "flash4"))


def test_the_compiler_sees_one_graph(recorder):
    FLASH4.make_ready(CPU, torch.float32, 64)
    q, k, v = rows(dtype=torch.float32)
    compiled = torch.compile(FLASH4.attend, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v, GROUPS), FLASH4(q, k, v, GROUPS))
    torch._dynamo.reset()
