"""A memory plan for a checkpoint on a device of this machine, and its carrying out for blocks.

Asks torch how much is free; the plan itself is made in ``memory``.
"""

import logging
from collections.abc import Collection

import torch

from redux_pipelines.cards import Card, with_free
from redux_pipelines.memory import MEMORY_MODES, largest_demand, plan
from redux_pipelines.memory_plan import Options, Plan
from redux_pipelines.model_sizes import ModelSizes
from redux_pipelines.offload import BlockStream
from redux_pipelines.options import LoadOptions
from redux_pipelines.transformer import Flux

logger = logging.getLogger(__name__)

_CPU = Card("the CPU", 0)


def check_memory(memory: str, backend: str) -> None:
    """Raise ``ValueError`` for a mode that does not exist or that ``backend`` cannot carry out."""
    if memory not in MEMORY_MODES:
        names = ", ".join(repr(mode) for mode in MEMORY_MODES)
        raise ValueError(f"memory={memory!r} is not one of {names}")
    if backend == "diffusers" and memory not in ("auto", "resident"):
        raise ValueError(
            f"memory={memory!r} needs backend='engine'; 'diffusers' knows 'auto' and 'resident'"
        )


def plan_here(
    sizes: ModelSizes,
    how: LoadOptions,
    *,
    device: torch.device,
    dtype: torch.dtype,
    is_fp8: bool,
) -> Plan:
    """The plan for a checkpoint of these ``sizes``, written to the log if it is one for a GPU.

    ``is_fp8``: the transformer's matrices will be in fp8. On a CPU ``auto`` is ``resident``;
    ``evict`` and ``offload`` then put into host memory whatever they can, which gains nothing
    there. Raises ``MemoryPlanError``.
    """
    options = Options(
        dtype=str(dtype).removeprefix("torch."),
        is_fp8=is_fp8,
        demand=largest_demand(sizes, how.max_batch_size),
    )
    if device.type != "cuda":
        return plan(sizes, _CPU, options, "resident" if how.memory == "auto" else how.memory)
    mode = "resident" if how.backend == "diffusers" else how.memory
    made = plan(sizes, card_of(device), options, mode)
    logger.info("memory plan: %s", made.describe())
    if not made.fits:
        logger.warning("memory plan: %s", made.shortage)
    return made


def card_of(device: torch.device) -> Card:
    """The GPU as it is now: what other processes, and this one so far, leave of it.

    ``torch.cuda.set_per_process_memory_fraction`` counts too.
    """
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total_bytes
    own_bytes = torch.cuda.memory_reserved(device)
    name = torch.cuda.get_device_properties(device).name
    return with_free(name, min(free_bytes, int(allowed) - own_bytes))


def stream_blocks(flux: Flux, streamed: Collection[int], device: torch.device) -> None:
    """Let ``streamed`` blocks of ``flux``, which are in host memory, come when they are needed."""
    stream = BlockStream(flux.blocks, streamed, device)
    stream.open()
    flux.blocks_ready = stream.ready
