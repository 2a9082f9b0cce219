"""What ``flux-redux doctor`` finds of GPUs: what is there, what fits, which attention, whether fp8.

The memory plan is that of a GPU of this machine, or of a card that is only imagined. Attention and
fp8 are asked by the small self-tests that loading a model runs. Downloads nothing.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from redux_pipelines.errors import AttentionError, MemoryPlanError
from redux_pipelines.loading import load
from redux_pipelines.memory.cards import Card, sold_as
from redux_pipelines.memory.model_sizes import FLUX_DEV, FLUX_SCHNELL, ModelSizes, read_sizes
from redux_pipelines.memory.plan import Options, gb, largest_demand, plan
from redux_server.cli.doctor.findings import Finding, Level, gigabytes
from redux_server.cli.doctor.model import locate
from redux_server.dispatch.local import devices, worker_devices
from redux_server.settings import ServerSettings, UsageError
from redux_weights.embedded import find_mini

if TYPE_CHECKING:
    import torch

# Of this machine's memory, for weights; the rest is for the system and the worker itself.
_USABLE_SHARE = 0.8
_FLUX_HEAD_DIM = 128
_FP8 = "fp8"


def check_gpu(settings: ServerSettings) -> Iterator[Finding]:
    """The GPUs torch can use, and whether they are those that ``--device`` asks for."""
    import torch

    try:
        groups = worker_devices(settings.device, settings.parallel)
    except UsageError as error:
        yield Finding(Level.MISSING, "gpu", str(error))
        return
    wanted = [name for group in groups for name in group.split(",")]
    count = _count()
    for i in range(count):
        yield Finding(Level.OK, f"cuda:{i}", _describe_gpu(i))
    if count:
        yield Finding(Level.OK, "driver", _driver_version())
    lacking = [name for name in wanted if not _is_there(name)]
    if lacking:
        yield Finding(
            Level.MISSING,
            "gpu",
            f"torch {torch.__version__} cannot use {', '.join(lacking)}; install a CUDA build of "
            "torch and a driver that fits it, or choose --device cpu",
        )
    elif wanted == ["cpu"]:
        yield Finding(Level.NOTE, "gpu", "none is used: FLUX.1 takes minutes for an image")
    dtype = _dtype_name(settings, wanted)
    yield Finding(
        Level.OK, "would run", f"{settings.backend} backend, {dtype} on {', '.join(wanted)}"
    )
    if not lacking:
        yield from _slow_dtype(dtype, wanted)


def _dtype_name(settings: ServerSettings, on: list[str]) -> str:
    """The dtype that ``--dtype`` means on these devices."""
    if settings.dtype != "auto":
        return settings.dtype
    return "float32" if on == ["cpu"] else "bfloat16"


def _describe_gpu(index: int) -> str:
    import torch

    properties = torch.cuda.get_device_properties(index)
    text = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    return f"{text}, {gigabytes(properties.total_memory)}"


def _slow_dtype(dtype: str, wanted: list[str]) -> Iterator[Finding]:
    import torch

    from redux_pipelines.devices import slow_reason

    for name in wanted:
        device = torch.device("cpu" if name == "cpu" else f"cuda:{_index(name)}")
        if (reason := slow_reason(device, getattr(torch, dtype))) is not None:
            yield Finding(Level.NOTE, "dtype", reason)


def _count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _is_there(device: str) -> bool:
    return device == "cpu" or _index(device) < _count()


def _index(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def _driver_version() -> str:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0].strip() if path.exists() else "unknown version"


# --- Memory ---------------------------------------------------------------------------------------


def check_memory(settings: ServerSettings) -> Iterator[Finding]:
    """What the plan for each GPU of this machine would be, with what is free on it now."""
    import torch

    from redux_pipelines.memory.cards import card_of

    for name in devices(settings.device):
        if name != "cpu" and _is_there(name):
            yield from _judge_memory(settings, card_of(torch.device(name)), f"{name} memory")


def check_card(settings: ServerSettings, gigabytes: float) -> Iterator[Finding]:
    """What a card sold with so many GB would hold, in ``--dtype`` and with its matrices in fp8."""
    card = sold_as(gigabytes)
    yield from _judge_memory(settings, card, card.name.removeprefix("a "), is_imagined=True)


def _judge_memory(
    settings: ServerSettings, card: Card, subject: str, *, is_imagined: bool = False
) -> Iterator[Finding]:
    label, sizes = _chosen_sizes(settings)
    dtype = "bfloat16" if settings.dtype == "auto" else settings.dtype
    is_fp8 = settings.transformer_dtype == "fp8"
    is_fp8 |= settings.transformer_dtype == "auto" and sizes.is_fp8
    demand = largest_demand(sizes, settings.max_batch_size)
    graphs = settings.graphs if settings.backend == "engine" else 0
    options = Options(dtype, is_fp8, demand, graphs)
    both = [options, replace(options, is_fp8=True)]
    for each in both if is_imagined and not is_fp8 else [options]:
        try:
            planned = plan(sizes, card, each, settings.memory)
        except MemoryPlanError as error:
            yield Finding(Level.NOTE, subject, f"{label}: {error}")
            continue
        text = f"{label} in {planned.options.dtype_name}: {planned.summary}"
        yield Finding(Level.OK, subject, text)
        if not planned.fits:
            yield Finding(Level.NOTE, subject, planned.shortage)
        if not is_imagined:
            yield from _check_host(planned.host_bytes)


def _check_host(wanted_bytes: int) -> Iterator[Finding]:
    """Whether this machine has room for the weights that do not stay on the GPU."""
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if wanted_bytes > _USABLE_SHARE * total_bytes:
        text = (
            f"{gb(wanted_bytes)} of weights would live in host memory, of which there are "
            f"{gb(total_bytes)} in all"
        )
        yield Finding(Level.NOTE, "host memory", text)


def _chosen_sizes(settings: ServerSettings) -> tuple[str, ModelSizes]:
    """A name for people, and sizes, of the model that the settings choose.

    They come from its files where these are here. The models that are embedded fit everywhere, so
    it is FLUX.1 [dev] that is judged for them.
    """
    known = {
        "flux-dev": (load.FLUX_DEV, FLUX_DEV),
        "flux-schnell": (load.FLUX_SCHNELL, FLUX_SCHNELL),
    }
    repository, sizes = known.get(settings.model, (load.FLUX_DEV, FLUX_DEV))
    base, redux = settings.base or repository, settings.redux or load.FLUX_REDUX
    label = settings.base or ("FLUX.1 [schnell]" if sizes is FLUX_SCHNELL else "FLUX.1 [dev]")
    folders = locate(base, settings.revision), locate(redux, "")
    return label, _read_sizes(*folders) or sizes


def _read_sizes(base: Path | None, redux: Path | None) -> ModelSizes | None:
    """None where files are not here or not whole, which ``check_model`` tells."""
    if base is None or redux is None:
        return None
    try:
        return read_sizes(base, redux)
    except (OSError, ValueError, KeyError):
        return None


# --- Attention ------------------------------------------------------------------------------------


def check_attention(settings: ServerSettings) -> Iterator[Finding]:
    """The attention of the engine on each kind of device, and each refused one with its reason."""
    if settings.backend != "engine" or settings.model.startswith("fake"):
        return
    import torch

    from redux_pipelines.devices import as_current

    wanted = devices(settings.device)
    dtype = getattr(torch, _dtype_name(settings, wanted))
    for name in wanted:
        if _is_there(name):
            device = torch.device(name)
            with as_current(device):
                found = list(_check_device(settings, device, dtype))
            yield from found


def _check_device(
    settings: ServerSettings, device: "torch.device", dtype: "torch.dtype"
) -> Iterator[Finding]:
    from redux_pipelines.attention.choice import survey

    head_dim = _head_dim(settings)
    yield from _check_choice(settings.attention, device, dtype, head_dim)
    found = survey(device, dtype, head_dim)
    usable = ", ".join(name for name, reason in found.items() if reason is None)
    yield Finding(Level.OK, "attention", f"fit for {device}, best first: {usable or 'none'}")
    yield from (Finding(Level.OK, "attention", line) for line in _refused(found))


def _check_choice(
    wanted: str, device: "torch.device", dtype: "torch.dtype", head_dim: int
) -> Iterator[Finding]:
    """What ``serve`` would take, but for what it would have to download first."""
    from redux_pipelines.attention.choice import AUTO, candidates_for, choose

    try:
        candidates = candidates_for(wanted)
        waiting = [each for each in candidates if each.on_request and wanted != AUTO]
        for each in waiting:
            text = f"{each.name} is tried by serve only: it {each.on_request}"
            yield Finding(Level.NOTE, "attention", text)
        rest = tuple(each for each in candidates if each not in waiting)
        if rest:
            choice = choose(device, dtype, head_dim, rest, asked_for=wanted != AUTO)
            kind = str(dtype).removeprefix("torch.")
            text = f"{choice.attention.name}, for heads of {head_dim} in {kind} on {device}"
            yield Finding(Level.OK, "attention", text)
    except (AttentionError, ValueError) as error:
        yield Finding(Level.MISSING, "attention", f"{error}; choose another --attention")


def _refused(found: Mapping[str, str | None]) -> Iterator[str]:
    """One line for each reason, with all whom it concerns."""
    for reason in dict.fromkeys(reason for reason in found.values() if reason is not None):
        names = [name for name, why in found.items() if why == reason]
        yield f"not {', '.join(names)}: {reason}"


def _head_dim(settings: ServerSettings) -> int:
    """That of the model's transformer, where its files are here already; else FLUX.1's."""
    folder = Path(settings.base).expanduser() if settings.base else None
    if folder is None and settings.model == load.MINI:
        folder = find_mini().base
    config = folder / "transformer" / "config.json" if folder is not None else None
    if config is None or not config.is_file():
        return _FLUX_HEAD_DIM
    return int(json.loads(config.read_text())["attention_head_dim"])


# --- fp8 ------------------------------------------------------------------------------------------


def check_fp8(settings: ServerSettings) -> Iterator[Finding]:
    """What the start-up self-test of fp8 says on each device; of a CPU only if fp8 is asked for."""
    is_wanted = settings.transformer_dtype == "fp8"
    if is_wanted and settings.backend != "engine":
        text = f"needs --backend engine, and it is {settings.backend}"
        yield Finding(Level.MISSING, _FP8, text)
        return
    for name in devices(settings.device):
        if _is_there(name) and (is_wanted or name != "cpu"):
            yield _judge_fp8(name, settings.dtype, is_wanted=is_wanted)


def _judge_fp8(name: str, dtype: str, *, is_wanted: bool) -> Finding:
    from redux_pipelines.devices import as_current, resolve_device, resolve_dtype
    from redux_pipelines.fp8 import self_test

    device = resolve_device(name)
    with as_current(device):
        reason = self_test.refusal(device, resolve_dtype(dtype, device))
    if reason is not None:
        text = f"not on {name}: {reason}"
        if is_wanted:
            return Finding(Level.MISSING, _FP8, f"{text}; choose --transformer-dtype auto")
        return Finding(Level.NOTE, _FP8, text)
    if name == "cpu":
        text = "the self-test passed on the CPU, where fp8 is for trying out: it is slow"
        return Finding(Level.NOTE, _FP8, text)
    advice = "" if is_wanted else "; --transformer-dtype fp8 saves a third of the weights' memory"
    return Finding(Level.OK, _FP8, f"the self-test passed on {name}{advice}")
