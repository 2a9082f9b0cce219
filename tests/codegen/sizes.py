"""Exact numbers of FLUX.1-dev that need no code: parameters, operations, activations, merging.

Counted on tensors without memory. Operations are those of matrix products and attention, as
``torch.utils.flop_counter`` counts them.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import traffic
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from codegen.networks import (
    FOLDED_TEXT,
    IMAGE,
    PICTURE,
    TEXT,
    Maker,
    Network,
    attention,
    diffusers_network,
    our_network,
)
from live_bytes import LiveBytes
from redux_pipelines.attention.groups import Groups, KeyGroup, merged

DOUBLES, SINGLES = 19, 38


def parameters_of_diffusers() -> int:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    return sum(weight.numel() for weight in model.parameters())


def parameters_of_ours() -> int:
    from redux_pipelines.network.flux import Flux, FluxParams

    with torch.device("meta"):
        flux = Flux(FluxParams())
    return sum(weight.numel() for weight in flux.parameters())


def operations_of_diffusers() -> int:
    """Of a step at 1024 × 1024."""
    return _operations(*diffusers_network(DOUBLES, SINGLES, Maker("meta"), TEXT))


def operations_of_ours(text: int) -> int:
    """Of a step at 1024 × 1024; once a request, the modulations and the text's embedding."""
    attend = F.scaled_dot_product_attention
    return _operations(*our_network(DOUBLES, SINGLES, Maker("meta"), text, attend))


def _operations(function: Callable[..., object], tensors: tuple[torch.Tensor, ...]) -> int:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*tensors)
    return int(counter.get_total_flops())


def peak(network: Callable[..., Network], doubles: int, singles: int, text: int) -> int:
    """The most bytes that a step of so few blocks holds at once, apart from weights and inputs."""
    stock, F.scaled_dot_product_attention = F.scaled_dot_product_attention, _opaque
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            function, tensors = network(doubles, singles, Maker("cpu"), text)
            with LiveBytes() as live:
                function(*tensors)
    finally:
        F.scaled_dot_product_attention = stock
    return live.peak


def _opaque(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: object
) -> torch.Tensor:
    return attention(query, key, value)


HIDDEN, FOLDED = KeyGroup(6, -math.inf), KeyGroup(1, math.log(512))
GROUPS = {
    "2 groups": (HIDDEN, FOLDED, KeyGroup(PICTURE + IMAGE, 0.0)),
    "3 groups": (HIDDEN, KeyGroup(PICTURE, math.log(0.5)), FOLDED, KeyGroup(IMAGE, 0.0)),
    "5 groups": (
        KeyGroup(4, -math.inf),
        *(KeyGroup(PICTURE, math.log(weight)) for weight in (0.2, 0.5, 1.5)),
        FOLDED,
        KeyGroup(IMAGE, 0.0),
    ),
}
"""Without a prompt: strength 1, a picture at strength 0.5, three pictures with weights."""


class Merging(TorchDispatchMode):
    """Counts what runs after attention: launches, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.size_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "redux":
            outs, _lses, _biases, q, keys, *_ = args
            batch, heads, rows, d = q.shape
            counts = {"parts": len(outs), "keys": len(keys)}
            self.size_bytes += traffic.merge_groups(batch * rows, heads, d, **counts)
            self.launches += 1
        elif not func.is_view and "empty" not in str(func):
            tensors = [each for each in tree_leaves((args, out)) if isinstance(each, torch.Tensor)]
            self.size_bytes += sum(each.nbytes for each in tensors)
            self.launches += 1
        return out


def merging(groups: Groups, merge: Any = merged) -> Merging:
    """Of a block whose attention goes where the next linear reads it."""
    rows, heads, d = sum(group.rows for group in groups), 24, 128
    make = Maker("meta")
    q, k, v = make(1, rows, 3, heads, d).permute(2, 0, 3, 1, 4).unbind(0)
    into = make(1, rows, 5, heads, d)[:, :, 0].transpose(1, 2)

    def partial(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        out = q.new_empty(1, rows, heads, d).transpose(1, 2)
        return out, q.new_empty(1, heads, rows, 1, dtype=torch.float32)

    with Merging() as counted:
        merge(partial, (q, k, v), groups, into)
    return counted


MEASURED: dict[str, Callable[[], int]] = {
    "parameters, diffusers": parameters_of_diffusers,
    "parameters, ours": parameters_of_ours,
    "operations, diffusers": operations_of_diffusers,
    "operations, ours": lambda: operations_of_ours(TEXT),
    "operations, ours, folded": lambda: operations_of_ours(FOLDED_TEXT),
    "peak, double block, diffusers": lambda: peak(diffusers_network, 1, 0, TEXT),
    "peak, double block, ours": lambda: peak(our_network, 1, 0, TEXT),
    "peak, double block, ours, folded": lambda: peak(our_network, 1, 0, FOLDED_TEXT),
    "peak, single block, diffusers": lambda: peak(diffusers_network, 0, 2, TEXT),
    "peak, single block, ours": lambda: peak(our_network, 0, 2, TEXT),
    "peak, single block, ours, folded": lambda: peak(our_network, 0, 2, FOLDED_TEXT),
    **{
        f"{what}, merging {name}": lambda groups=groups, field=field: getattr(  # type: ignore[misc]
            merging(groups), field
        )
        for name, groups in GROUPS.items()
        for what, field in (("launches", "launches"), ("bytes", "size_bytes"))
    },
}
"""Two single blocks, for ours treats the last one differently: the peak is the first one's."""
