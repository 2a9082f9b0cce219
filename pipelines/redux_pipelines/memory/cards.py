"""How many bytes of a GPU a plan may count on: of one that is there, or of one that is sold.

A card of "24 GB" has 24 GiB, of which driver and error correction keep some; what is left is what
CUDA reports. Imports torch only where a GPU is asked.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 2**30
USABLE_GIB = {12: 11.49, 16: 15.48, 24: 22.03, 48: 44.34, 80: 79.18}
"""By the size a card is sold with: the least that torch calls a card's "total capacity".

From out-of-memory messages that users made public: 12 GB 11.49–11.76 (RTX 3060, 4070), 16 GB
15.48–15.99 (RTX 4060 Ti, 4080), 24 GB 22.03–22.15 with error correction (L4, A10G) and 23.49–23.88
without (RTX 3090, 4090), 48 GB 44.34–44.47 with (L40S, A40) and 47.40–47.53 without (A6000), 80 GB
79.18–79.25 (A100, H100).
"""
_LEAST_SHARE = min(usable / sold for sold, usable in USABLE_GIB.items())
CONTEXT_BYTES = GIB // 2
"""Of a CUDA context with its kernels: about 0.4 to 0.5 GiB in the same messages."""
UNSEEN_BYTES = GIB // 2
"""For what the formulas cannot see: workspaces of cuDNN and cuBLAS, gaps in the allocator's
memory, kernels loaded later. A guess: it was not measured."""


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU by name, and the bytes that weights and activations may take on it."""

    name: str
    budget_bytes: int


def sold_as(gigabytes: float) -> Card:
    """A card sold with so many "GB", all of it ours but for what is never free."""
    usable = USABLE_GIB.get(gigabytes, gigabytes * _LEAST_SHARE)  # type: ignore[call-overload]
    budget = int(usable * GIB) - CONTEXT_BYTES - UNSEEN_BYTES
    return Card(f"a {gigabytes:g} GB card", max(budget, 0))


def with_free(name: str, free_bytes: int) -> Card:
    """A card with ``free_bytes`` free, as ``torch.cuda.mem_get_info`` says: its context is made."""
    return Card(name, max(free_bytes - UNSEEN_BYTES, 0))


def card_of(device: "torch.device") -> Card:
    """The GPU as it is now: what other processes, and this one so far, leave of it.

    ``torch.cuda.set_per_process_memory_fraction`` counts too.
    """
    import torch

    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total_bytes
    own_bytes = torch.cuda.memory_reserved(device)
    name = torch.cuda.get_device_properties(device).name
    return with_free(name, min(free_bytes, int(allowed) - own_bytes))
