"""A dtype that a device computes slowly is said, with what to use instead."""

import pytest
import torch

from redux_pipelines import devices
from redux_pipelines.devices import slow_reason

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
