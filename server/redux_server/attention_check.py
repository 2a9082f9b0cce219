"""The part of ``flux-redux doctor`` that asks which attention would run, and why no other.

Runs the small self-tests that loading a model runs. Downloads nothing.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from redux_pipelines.loading import MINI
from redux_server.findings import Finding, Level
from redux_server.settings import ServerSettings
from redux_weights.embedded import find_mini

if TYPE_CHECKING:
    import torch

_FLUX_HEAD_DIM = 128


def check_attention(settings: ServerSettings) -> Iterator[Finding]:
    """The attention of the engine on each kind of device, and each refused one with its reason."""
    if settings.backend != "engine" or settings.model.startswith("fake"):
        return
    import torch

    from redux_server.engine import devices

    wanted = devices(settings.device)
    dtype = getattr(torch, dtype_name(settings, wanted))
    for name in wanted:
        if name == "cpu" or torch.cuda.is_available():
            yield from _check_device(settings, torch.device(name), dtype)


def dtype_name(settings: ServerSettings, devices: list[str]) -> str:
    """The dtype that ``--dtype`` means on these devices."""
    if settings.dtype != "auto":
        return settings.dtype
    return "float32" if devices == ["cpu"] else "bfloat16"


def _check_device(
    settings: ServerSettings, device: "torch.device", dtype: "torch.dtype"
) -> Iterator[Finding]:
    from redux_pipelines.attention_choice import survey

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
    from redux_pipelines.attention_choice import AUTO, candidates_for, choose
    from redux_pipelines.errors import AttentionError

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
    if folder is None and settings.model == MINI:
        folder = find_mini().base
    config = folder / "transformer" / "config.json" if folder is not None else None
    if config is None or not config.is_file():
        return _FLUX_HEAD_DIM
    return int(json.loads(config.read_text())["attention_head_dim"])
