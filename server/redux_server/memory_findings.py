"""The part of ``flux-redux doctor`` that says what a GPU, here or imagined, would hold."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from redux_pipelines import loading
from redux_pipelines.cards import Card, sold_as
from redux_pipelines.errors import MemoryPlanError
from redux_pipelines.memory import largest_demand, plan
from redux_pipelines.memory_plan import Options, gb
from redux_pipelines.model_sizes import FLUX_DEV, FLUX_SCHNELL, ModelSizes, read_sizes
from redux_server.findings import Finding, Level
from redux_server.settings import ServerSettings
from redux_server.weights_check import locate

_USABLE_SHARE = 0.8
"""Of this machine's memory, for weights; the rest is for the system and the worker itself."""


def check_memory(settings: ServerSettings) -> Iterator[Finding]:
    """What the plan for each GPU of this machine would be, with what is free on it now."""
    import torch

    from redux_pipelines.placing import card_of
    from redux_server.engine import devices

    if not torch.cuda.is_available():
        return
    for name in devices(settings.device):
        if name != "cpu":
            yield from _judge(settings, card_of(torch.device(name)), f"{name} memory")


def check_card(settings: ServerSettings, gigabytes: float) -> Iterator[Finding]:
    """What a card sold with so many GB would hold, in ``--dtype`` and with its matrices in fp8."""
    card = sold_as(gigabytes)
    yield from _judge(settings, card, card.name.removeprefix("a "), is_imagined=True)


def _judge(
    settings: ServerSettings, card: Card, subject: str, *, is_imagined: bool = False
) -> Iterator[Finding]:
    label, sizes = chosen_sizes(settings)
    dtype = "bfloat16" if settings.dtype == "auto" else settings.dtype
    is_fp8 = settings.transformer_dtype == "fp8"
    is_fp8 |= settings.transformer_dtype == "auto" and sizes.is_fp8
    options = Options(dtype, is_fp8, largest_demand(sizes, settings.max_batch_size))
    both = [options, replace(options, is_fp8=True)]
    for each in both if is_imagined and not is_fp8 else [options]:
        try:
            made = plan(sizes, card, each, settings.memory)
        except MemoryPlanError as error:
            yield Finding(Level.NOTE, subject, f"{label}: {error}")
            continue
        text = f"{label} in {made.options.dtype_name}: {made.summary}"
        yield Finding(Level.OK, subject, text)
        if not made.fits:
            yield Finding(Level.NOTE, subject, made.shortage)
        if not is_imagined:
            yield from _check_host(made.host_bytes)


def _check_host(wanted_bytes: int) -> Iterator[Finding]:
    """Whether this machine has room for the weights that do not stay on the GPU."""
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if wanted_bytes > _USABLE_SHARE * total_bytes:
        text = (
            f"{gb(wanted_bytes)} of weights would live in host memory, of which there are "
            f"{gb(total_bytes)} in all"
        )
        yield Finding(Level.NOTE, "host memory", text)


def chosen_sizes(settings: ServerSettings) -> tuple[str, ModelSizes]:
    """A name for people, and sizes, of the model that the settings choose.

    They come from its files where these are here. The models that are embedded fit everywhere, so
    it is FLUX.1 [dev] that is judged for them.
    """
    known = {
        "flux-dev": (loading.FLUX_DEV, FLUX_DEV),
        "flux-schnell": (loading.FLUX_SCHNELL, FLUX_SCHNELL),
    }
    repository, sizes = known.get(settings.model, (loading.FLUX_DEV, FLUX_DEV))
    base, redux = settings.base or repository, settings.redux or loading.FLUX_REDUX
    label = settings.base or ("FLUX.1 [schnell]" if sizes is FLUX_SCHNELL else "FLUX.1 [dev]")
    folders = locate(base, settings.revision), locate(redux, "")
    return label, _read(*folders) or sizes


def _read(base: Path | None, redux: Path | None) -> ModelSizes | None:
    """None where files are not here or not whole, which ``check_model`` tells."""
    if base is None or redux is None:
        return None
    try:
        return read_sizes(base, redux)
    except (OSError, ValueError, KeyError):
        return None
