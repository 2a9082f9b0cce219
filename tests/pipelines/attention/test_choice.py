"""The first attention that runs and is right is taken; what is wrong never is."""

import math
import zlib

import pytest
import torch
import torch.nn.functional as F

from redux_pipelines.attention import choice as choice_module
from redux_pipelines.attention.backends import IMPLEMENTATIONS
from redux_pipelines.attention.choice import (
    NAMES,
    candidates_for,
    choose,
    refusal,
    resolve,
    self_test,
    survey,
)
from redux_pipelines.attention.groups import (
    Capabilities,
    Implementation,
    KeyGroup,
    grouped,
    key_bias,
    merged,
    reference,
    written,
)
from redux_pipelines.errors import AttentionError
from stand_ins import NOT_COMPUTING, Computation, doing_nothing, fixing

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _writing(attend):
    """Writes its result where it is wanted, whatever that result is."""

    def write(q, k, v, groups, into=None):
        return written(attend(q, k, v, groups), into)

    return write


def _implementation(name, attend, devices=("cpu",), **fields):
    return Implementation(name, _writing(attend), devices, (torch.float32,), **fields)


def _raising(q, k, v, groups):
    raise RuntimeError("no kernel image\nis available")


def _partial(q, k, v, scale=1.0):
    """Attention to one group and its log-sum-exp, all right but for ``scale``."""
    kind = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(kind) @ k.to(kind).transpose(-1, -2) * scale / math.sqrt(q.shape[-1])
    return (logits.softmax(-1) @ v.to(kind)).to(q.dtype), logits.logsumexp(-1, keepdim=True)


def _base_two(q, k, v):
    out, lse = _partial(q, k, v)
    return out, lse / math.log(2)


def _wrong_scale(q, k, v):
    return _partial(q, k, v, scale=0.9)


def _without_bias(q, k, v, groups):
    return reference(q, k, v, (KeyGroup(k.shape[2], 0.0),))


def _without_minus_infinity(q, k, v, groups):
    """As a kernel that adds a large negative number in the wrong unit would."""
    return reference(q, k, v, tuple(KeyGroup(each.rows, max(each.bias, -6.0)) for each in groups))


def _nan(q, k, v, groups):
    return q * math.nan


def _one_nan(q, k, v, groups):
    out = reference(q, k, v, groups)
    out[-1, -1, -1, -1] = math.nan
    return out


def _without_last_key(q, k, v, groups):
    if k.shape[2] == 1:
        return reference(q, k, v, groups)
    *others, last = groups
    rest = (KeyGroup(last.rows - 1, last.bias),) if last.rows > 1 else ()
    return reference(q, k[:, :, :-1], v[:, :, :-1], (*others, *rest))


def _without_the_tail_of_a_tile(q, k, v, groups):
    """Keys beyond the last multiple of 64 are not read."""
    bias, left = [], k.shape[2] // 64 * 64 or k.shape[2]
    for group in groups:
        rows = min(group.rows, left)
        bias += [KeyGroup(rows, group.bias)] if rows else []
        left -= rows
    rows = sum(group.rows for group in bias)
    return reference(q, k[:, :, :rows], v[:, :, :rows], tuple(bias))


def _first_image_only(q, k, v, groups):
    return reference(q, k[:1].expand_as(k), v[:1].expand_as(v), groups)


def _overflowing(q, k, v, groups):
    """exp without the largest logit taken off, in half precision as the weights may be."""
    bias = torch.cat([torch.full((group.rows,), group.bias) for group in groups])
    logits = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
    weights = logits.exp().half().float()
    return (weights @ v.float() / weights.sum(-1, keepdim=True)).to(q.dtype)


def _elsewhere(q, k, v, groups, into=None):
    return reference(q, k, v, groups)


def _contiguous_only(q, k, v, groups):
    """Reads v as if its rows lay side by side."""
    v = torch.as_strided(v, v.shape, v.contiguous().stride(), v.storage_offset())
    return reference(q, k, v, groups)


WRONG = {
    "bias ignored": _writing(_without_bias),
    "minus infinity is finite": _writing(_without_minus_infinity),
    "NaN": _writing(_nan),
    "one NaN": _writing(_one_nan),
    "log-sum-exp of base 2": grouped(_base_two),
    "wrong scale": grouped(_wrong_scale),
    "last key dropped": _writing(_without_last_key),
    "tail of a tile dropped": _writing(_without_the_tail_of_a_tile),
    "first image for all": _writing(_first_image_only),
    "overflow": _writing(_overflowing),
    "strides ignored": _writing(_contiguous_only),
    "place ignored": _elsewhere,
}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attend", WRONG.values(), ids=WRONG)
def test_wrong_attention_is_refused(attend, dtype, head_dim):
    wrong = Implementation("wrong", attend, ("cpu",), tuple(DTYPES))
    reason = refusal(wrong, CPU, dtype, head_dim)
    assert reason is not None
    assert reason.startswith("is wrong: relative error")


QKV = ("q", "k", "v")
PARTIAL = Computation(_partial, QKV)


def _attention(partial):
    """By groups, as libraries without biases are used."""
    return grouped(partial)


def _merging(partial):
    """As on a GPU: a kernel merges the groups, and takes single keys as they are."""
    return lambda q, k, v, groups, into=None: merged(partial, (q, k, v), groups, into)


def _with_bias(product):
    """One call with a bias per key, as torch's and our own kernel have it."""

    def run(q, k, v, groups, into=None):
        return written(product(q, k, v, key_bias(groups, q.device, torch.float32)), into)

    return run


def _product(q, k, v, bias):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


def _every_path():
    """What is called, and the way in which attention is made of it."""
    yield "groups", PARTIAL, _attention
    yield "merged", PARTIAL, _merging
    yield "bias", Computation(_product, (*QKV, "bias")), _with_bias
    for each in IMPLEMENTATIONS:
        if not each.unfit(CPU, torch.float32):
            arguments = (*QKV, "groups", "into")
            yield each.name, Computation(each.attend, arguments, ("into",)), lambda attend: attend


PATHS = {name: rest for name, *rest in _every_path()}
CHANGES = {name: change for name, change in NOT_COMPUTING.items() if change is not doing_nothing}
ARGUMENTS = [
    (path, argument)
    for path, (right, _) in PATHS.items()
    for argument in right.arguments
    if argument not in right.written
]


def _verdict(path, stand_in):
    _, attention = PATHS[path]
    candidate = Implementation(path, attention(stand_in), ("cpu",), (torch.float32,))
    return refusal(candidate, CPU, torch.float32, 16)


@pytest.mark.parametrize("path", PATHS)
def test_every_way_to_compute_attention_passes(path):
    assert _verdict(path, PATHS[path][0].compute) is None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_attention_that_does_not_compute_is_refused(path, change):
    reason = _verdict(path, change(PATHS[path][0]))
    assert reason is not None
    assert reason.startswith("is wrong: relative error")


@pytest.mark.parametrize(("path", "argument"), ARGUMENTS)
def test_attention_that_ignores_an_argument_is_refused(path, argument):
    """It computes with the first one of that shape."""
    assert str(_verdict(path, fixing(argument, PATHS[path][0]))).startswith("is wrong")


@pytest.mark.parametrize("path", PATHS)
def test_what_another_attention_left_in_memory_is_not_taken_for_a_result(path):
    """Memory that is freed is given out again as it is, to the next candidate in the same order."""
    left, right = [], PATHS[path][0]

    def working(*given):
        left.append(right.compute(*given))
        return left[-1]

    def idle(*given):
        return left.pop(0) if left else right.compute(*given)

    _, attention = PATHS[path]
    first, second = (
        Implementation(name, attention(run), ("cpu",), (torch.float32,))
        for name, run in (("first", working), ("second", idle))
    )
    assert refusal(first, CPU, torch.float32, 16) is None
    left = [each.clone() if isinstance(each, torch.Tensor) else each for each in left]
    assert str(refusal(second, CPU, torch.float32, 16)).startswith("is wrong")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rows_of_no_implementation_are_near_the_limit(name, dtype):
    """Each has its own, and a right one must not be refused by them."""
    limit, seed = choice_module._TOLERANCE[dtype], zlib.crc32(name.encode())
    assert self_test(grouped(_partial), CPU, dtype, 64, seed=seed) < 0.6 * limit


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_right_attention_passes_with_room_to_spare(dtype, head_dim):
    limit = choice_module._TOLERANCE[dtype]
    assert self_test(grouped(_partial), CPU, dtype, head_dim) < 0.6 * limit


def test_another_shape_or_dtype_is_refused():
    for attend, text in (
        (lambda q, k, v, groups: reference(q, k, v, groups).transpose(1, 2), "gives"),
        (lambda q, k, v, groups: reference(q, k, v, groups).double(), "float64"),
    ):
        reason = refusal(_implementation("odd", attend), CPU, torch.float32, 64)
        assert reason is not None
        assert text in reason


def test_the_first_that_works_is_chosen_and_the_others_say_why_not():
    candidates = (
        _implementation("elsewhere", reference, ("cuda",)),
        _implementation("raising", _raising),
        _implementation("wrong", _without_bias),
        _implementation("nan", _nan),
        _implementation("on request", reference, on_request="downloads"),
        _implementation("broken", reference, make_ready=lambda *_: "cannot be loaded: libcuda"),
        _implementation("right", reference),
        _implementation("never tried", _raising),
    )
    choice = choose(CPU, torch.float32, 16, candidates)
    assert choice.attention.name == "right"
    assert list(choice.refusals) == [each.name for each in candidates[:6]]
    assert choice.refusals["elsewhere"] == "runs on cuda, not on cpu"
    assert choice.refusals["raising"] == "failed: no kernel image"
    assert choice.refusals["wrong"].startswith("is wrong: relative error")
    assert "nan" in choice.refusals["nan"]
    assert choice.refusals["on request"] == "downloads"
    assert choice.refusals["broken"] == "cannot be loaded: libcuda"


@pytest.mark.parametrize(
    "error",
    [RuntimeError(""), AssertionError("odd\nmore"), ImportError("no libfoo.so"), TypeError()],
)
def test_whatever_goes_wrong_is_a_reason(error):
    def fail(*_):
        raise error

    for fields in ({"attend": fail}, {"attend": reference, "make_ready": fail}):
        reason = refusal(_implementation("fails", **fields), CPU, torch.float32, 16)
        assert reason == f"failed: {str(error).partition(chr(10))[0] or type(error).__name__}"


def test_a_dtype_that_is_not_taken_is_said():
    with pytest.raises(AttentionError, match=r"no attention for .*: only does not take float64"):
        choose(CPU, torch.float64, 16, (_implementation("only", reference),))


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that only names itself; gives it a compute capability."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Made-up GPU")

    def has(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return has


EXPECTED = {
    (7, 5): {"efficient"},
    (8, 0): {"cudnn", "flash2", "flash", "triton", "efficient"},
    (8, 9): {"cudnn", "flash2", "flash", "triton", "efficient"},
    (9, 0): {"flash4", "flash3", "flash3-hub", "cudnn", "flash2", "flash", "triton", "efficient"},
    (10, 0): {"flash4", "cudnn", "flash2", "flash", "triton", "efficient"},
    (12, 0): {"flash4", "cudnn", "flash2", "flash", "triton", "efficient"},
}


def named(value):
    """A name for a test that is the same in every process, unlike the order of a set."""
    return str(value) if isinstance(value, tuple) else "-".join(sorted(value))


@pytest.mark.parametrize(("capability", "names"), EXPECTED.items(), ids=named)
def test_architecture_decides_what_is_tried(gpu, capability, names):
    gpu(*capability)
    found = {each.name for each in IMPLEMENTATIONS if not each.unfit(CUDA, torch.bfloat16)}
    assert found == names


def test_an_unfit_one_is_refused_without_trying(gpu):
    gpu(8, 6)
    touched = []
    hopper = Implementation(
        "hopper", _raising, ("cuda",), (torch.float32,), 1, Capabilities((9, 0), 9),
        lambda *_: touched.append("made ready"),
    )  # fmt: skip
    reason = refusal(hopper, CUDA, torch.float32, 64)
    assert reason == "needs compute capability 9.0 to 9.x, Made-up GPU has 8.6"
    assert not touched


def test_without_a_gpu_none_for_a_gpu_is_tried(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = survey(CUDA, torch.bfloat16, 128)
    on_gpu = {each.name for each in IMPLEMENTATIONS if each.devices == ("cuda",)}
    assert {name for name, reason in found.items() if "torch sees none" in str(reason)} == on_gpu


def test_our_kernel_is_refused_where_only_its_reference_would_run(gpu, monkeypatch):
    """Else the reference, which is right but slow, would pass the test in its place."""
    gpu(9, 0)
    (ours,) = candidates_for("triton")
    assert ours.make_ready is not None
    assert ours.make_ready(CPU, torch.bfloat16, 64) == "kernels run on CUDA devices, not on 'cpu'"


@pytest.mark.parametrize(
    ("dtype", "name", "later"),
    [
        (torch.float32, "onednn", ["biased", "flash-cpu"]),
        (torch.bfloat16, "biased", ["flash-cpu"]),
        (torch.float64, "biased", ["flash-cpu"]),
    ],
    ids=str,
)
def test_a_cpu_takes_what_has_a_bias_per_key(dtype, name, later):
    choice = choose(CPU, dtype, 64)
    assert choice.attention.name == name
    assert choice.attention.row_multiple == 1
    assert set(choice.refusals) == set(NAMES) - {*later, name}


def test_one_can_be_forced():
    choice = resolve("flash-cpu", CPU, torch.float32, 64)
    assert choice.attention.name == "flash-cpu"
    assert not choice.refusals


def test_several_can_be_named_in_order_of_preference():
    choice = resolve("cudnn, flash-cpu,biased", CPU, torch.float32, 64)
    assert choice.attention.name == "flash-cpu"
    assert choice.refusals == {"cudnn": "runs on cuda, not on cpu"}


def test_one_that_is_forced_and_refused_says_why_and_what_there_is():
    with pytest.raises(AttentionError) as raised:
        resolve("cudnn", CPU, torch.float32, 64)
    assert str(raised.value) == (
        "no attention for float32 on cpu: cudnn runs on cuda, not on cpu; "
        "what can be used here: auto, onednn, biased, flash-cpu"
    )


@pytest.mark.parametrize("wanted", ["cuddn", "", "biased,", "biased,auto", "BIASED"])
def test_a_name_that_none_has_is_an_error(wanted):
    with pytest.raises(ValueError, match=r"is not one of auto, flash4, flash3, .*flash-cpu$"):
        candidates_for(wanted)


def test_what_waits_to_be_asked_for_is_tried_when_it_is(monkeypatch):
    waiting = _implementation("waiting", reference, on_request="downloads something")
    monkeypatch.setattr(choice_module, "IMPLEMENTATIONS", (waiting,))
    assert survey(CPU, torch.float32, 16) == {"waiting": "downloads something"}
    assert resolve("waiting", CPU, torch.float32, 16).attention is waiting
    with pytest.raises(AttentionError, match="waiting downloads something"):
        resolve("auto", CPU, torch.float32, 16)


def test_the_self_test_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    self_test(reference, CPU, torch.float32, 16)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gpu_finds_an_implementation(dtype):
    assert choose(torch.device("cuda"), dtype, 128).attention.devices == ("cuda",)
