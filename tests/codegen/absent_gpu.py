"""Torch made to believe in an NVIDIA GPU that is not there, so that it writes that GPU's code.

For a process of its own: what is replaced is never put back. Tensors must be fake, and nothing can
run. Replaces internals of torch 2.13 and triton 3.7: another version may need other replacements.
"""

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths, library_paths

GUARD = Path(__file__).with_name("noop_cuda_guard.cpp")
GIB = 2**30
H100 = SimpleNamespace(
    name="absent sm_90",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 * GIB,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    is_integrated=False,
    gcnArchName="",
    uuid="0",
    clock_rate=1_830_000,
    memory_clock_rate=2_619_000,
    memory_bus_width=5120,
)
CAPABILITY = (H100.major, H100.minor)


def install(compiler: str) -> None:
    """Replace what asks for a GPU; ``compiler`` is a C++ compiler. Once a process."""
    _load_guard(compiler)
    _pretend_torch()
    _pretend_triton()
    _configure_inductor()


def _load_guard(compiler: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "noop_cuda_guard.so"
        includes = [f"-I{path}" for path in include_paths()]
        libraries = [f"-L{path}" for path in library_paths()]
        options = ["-O1", "-std=c++20", "-shared", "-fPIC", *includes, str(GUARD)]
        subprocess.run([compiler, *options, "-o", library, *libraries, "-lc10"], check=True)
        ctypes.CDLL(str(library))


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: value


def _replace(place: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(place, name, _always(value))


def _pretend_torch() -> None:
    from torch._dynamo.device_interface import CudaInterface
    from torch._subclasses.fake_tensor import FakeTensorMode

    current = {"current_device": 0, "get_device_properties": H100}
    counted = {**current, "device_count": 1}
    asked = {
        **counted,
        "is_available": True,
        "is_initialized": False,
        "is_bf16_supported": True,
        "get_device_capability": CAPABILITY,
        "get_device_name": H100.name,
        "get_arch_list": ["sm_90"],
        "mem_get_info": (H100.total_memory, H100.total_memory),
        "synchronize": None,
        "set_device": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "_get_device": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    bound = ("getCurrentRawStream", "getDevice", "setDevice", "exchangeDevice")
    _replace(torch.cuda, asked)
    _replace(torch._C, {f"_cuda_{name}": 0 for name in (*bound, "maybeExchangeDevice")})
    _replace(CudaInterface, {**counted, "get_raw_stream": 0})
    _replace(CudaInterface.Worker, current)
    torch.version.cuda = "13.0"
    torch._C._set_only_lift_cpu_tensors(True)
    FakeTensorMode.avoid_device_init = property(lambda _self: True)


class _Driver:
    """Triton's driver as far as generating code needs it."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * H100.major + H100.minor, H100.warp_size)

    get_current_device = staticmethod(_always(0))
    get_current_stream = staticmethod(_always(0))
    is_active = staticmethod(_always(True))


def _pretend_triton() -> None:
    import torch.utils._triton as support
    from triton.runtime import driver

    driver._active = driver._default = _Driver()
    for each in vars(support).values():
        if hasattr(each, "cache_clear"):  # it has already looked for a GPU, and found none
            each.cache_clear()


def _configure_inductor() -> None:
    from torch._inductor import config

    config.shape_padding = False  # decides by measuring
    config.joint_graph_constant_folding = False  # makes the constants, on that GPU
    config.compile_threads = 1
    config.force_disable_caches = True
    config.triton.autotune_at_compile_time = False
    speeds = {"get_gpu_dram_gbps": 3350, "get_device_tflops": 989.0}
    for name, module in list(sys.modules.items()):
        if name.startswith("torch._inductor"):
            _replace(module, {key: value for key, value in speeds.items() if hasattr(module, key)})
