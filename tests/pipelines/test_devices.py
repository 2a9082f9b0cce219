"""A device's failures and what is left of them, its slow dtypes, and the memory it frees."""

import weakref
from types import SimpleNamespace

import pytest
import torch

from pipelines.pretended_gpus import PretendedGpus
from redux_pipelines import devices
from redux_pipelines.devices import slow_reason
from redux_pipelines.errors import DeviceError, DeviceMemoryError

NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
)
FINAL = (
    torch.AcceleratorError("CUDA error: device-side assert triggered\nCUDA kernel errors might"),
    torch.AcceleratorError("some other accelerator's words"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA driver error: invalid argument"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
)
ORDINARY = (
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ValueError("CUDA error: said by someone else"),
    MemoryError("out of memory"),
)


@pytest.mark.parametrize("error", [*NO_MEMORY, *FINAL, *ORDINARY], ids=str)
def test_kinds_are_told_apart(error):
    assert devices.is_out_of_memory(error) == (error in NO_MEMORY)
    assert devices.is_final(error) == (error in FINAL)


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
def test_a_lack_of_memory_says_what_to_do(error):
    with pytest.raises(DeviceMemoryError) as caught, devices.translated("ask for less"):
        raise error
    first_line = str(error).splitlines()[0]
    assert str(caught.value) == f"ask for less ({first_line})"


def test_a_final_failure_keeps_its_cause_for_the_log():
    with (
        pytest.raises(DeviceError, match=r"device-side assert triggered$") as caught,
        devices.translated(""),
    ):
        raise FINAL[0]
    assert caught.value.__cause__ is FINAL[0]


@pytest.mark.parametrize("error", ORDINARY, ids=str)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, devices.translated(""):
        raise error
    assert caught.value is error


def test_what_the_failed_work_held_is_freed():
    held = []

    def work():
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(DeviceMemoryError) as caught, devices.translated("ask for less"):
        work()
    assert caught.value.__traceback__ is not None
    assert held[0]() is None, "an error that is kept must not keep tensors"


# --- which device ---------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    return PretendedGpus(2).install(monkeypatch)


@pytest.mark.parametrize(
    ("named", "meant"),
    [("cpu", "cpu"), ("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0")],
)
def test_a_gpu_is_known_by_its_number(gpus, named, meant):
    gpus.current = 1  # the host program's choice
    assert str(devices.resolve_device(named)) == meant


def test_without_a_gpu_auto_is_the_cpu(gpus):
    gpus.count = 0
    assert str(devices.resolve_device("auto")) == "cpu"


@pytest.mark.parametrize("named", ["cuda:x", "cuda:", "gpu", "cuda:-1", "CPU"])
def test_other_words_are_no_devices(gpus, named):
    with pytest.raises(ValueError, match="is not one of 'auto', 'cpu', 'cuda', 'cuda:N'"):
        devices.resolve_device(named)


def test_a_gpu_beyond_the_last_is_refused(gpus):
    with pytest.raises(ValueError, match=r"device='cuda:2', but torch sees 2 CUDA device\(s\)"):
        devices.resolve_device("cuda:2")


@pytest.mark.parametrize(
    ("named", "within"), [("auto", 0), ("cpu", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)]
)
def test_work_has_its_device_as_the_current_one_and_gives_it_back(gpus, named, within):
    device = devices.resolve_device(named)
    with devices.as_current(device):
        assert gpus.current == within
    assert gpus.current == 0


def _numbered(gpus, seen):
    try:
        for number in range(3):
            seen.append(gpus.current)
            yield number
    finally:
        seen.append(gpus.current)


def test_a_generator_has_its_device_only_while_it_works(gpus):
    seen = []
    events = devices.each_as_current(torch.device("cuda:1"), _numbered(gpus, seen))
    for _ in events:
        assert gpus.current == 0, "it must not leak to whoever takes the events"
    assert seen == [1, 1, 1, 1]


def test_a_generator_that_is_closed_tidies_up_on_its_device(gpus):
    seen = []
    events = devices.each_as_current(torch.device("cuda:1"), _numbered(gpus, seen))
    assert next(events) == 0
    events.close()
    assert seen == [1, 1]
    assert gpus.current == 0


def test_a_generator_that_fails_gives_the_device_back(gpus):
    def fail():
        yield 0
        raise RuntimeError("no more")

    events = devices.each_as_current(torch.device("cuda:1"), fail())
    assert next(events) == 0
    with pytest.raises(RuntimeError, match="no more"):
        next(events)
    assert gpus.current == 0


# --- dtypes ---------------------------------------------------------------------------------------

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")


@pytest.mark.parametrize(("capability", "told"), [((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_gpus_before_ampere_have_no_bfloat16(monkeypatch, capability, told):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = slow_reason(GPU, torch.bfloat16)
    assert (reason is not None) is told
    if told:
        assert reason == "cuda:1 has no bfloat16 units, so it is slow; try --dtype float16"


@pytest.mark.parametrize("is_fast", [True, False])
def test_cpus_without_its_instructions_should_use_float32(monkeypatch, is_fast):
    monkeypatch.setattr(devices, "has_fast_bfloat16", lambda device: is_fast)
    reason = slow_reason(CPU, torch.bfloat16)
    assert reason is None if is_fast else "use --dtype float32" in reason


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_are_not_slow(device, dtype):
    assert slow_reason(device, dtype) is None


def test_a_cpu_is_asked_for_what_it_has():
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX2":
        assert not devices.has_fast_bfloat16(CPU)
    elif capability == "AVX512":
        assert devices.has_fast_bfloat16(CPU)


def test_to_wait_for_a_gpu_takes_no_processor_time(monkeypatch):
    made = []

    class Event:
        def __init__(self, *, blocking=False):
            made.append(blocking)

        def record(self, stream):
            assert stream == "current"

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    assert isinstance(devices.fence_on(torch.device("cuda", 1)), Event)
    assert made == [True]
    assert devices.fence_on(torch.device("cpu")) is None


# --- the GPU's allocator --------------------------------------------------------------------------


@pytest.fixture
def allocator(monkeypatch):
    """What a GPU's allocator is told; ``fails`` is raised when memory is taken."""
    given = SimpleNamespace(settings=[], fails=None, taken=[])

    def empty(size, *, dtype, device):
        given.taken.append(device)
        if given.fails is not None:
            raise given.fails

    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", given.settings.append)
    return given


def test_segments_grow_where_the_driver_can(allocator):
    assert devices.grow_segments("cuda:1")
    assert allocator.settings == ["expandable_segments:True"]
    assert allocator.taken == [torch.device("cuda", 1)]


def test_segments_are_fixed_again_where_memory_cannot_be_had_so(allocator):
    allocator.fails = RuntimeError("CUDA driver error: operation not supported")
    assert not devices.grow_segments("cuda:0")
    assert allocator.settings == ["expandable_segments:True", "expandable_segments:False"]


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_environment_has_the_last_word_on_the_allocator(allocator, monkeypatch, variable):
    monkeypatch.setenv(variable, "max_split_size_mb:512")
    assert not devices.grow_segments("cuda:0")
    assert not allocator.settings


def test_neither_a_cpu_nor_another_allocator_is_told_anything(allocator, monkeypatch):
    assert not devices.grow_segments("cpu")
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert not devices.grow_segments("cuda:0")
    assert not allocator.settings
