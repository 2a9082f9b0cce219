"""Exact numbers of FLUX.1-dev that need no code: parameters, operations, live activations.

Counted on tensors without memory. Operations are those of matrix products and attention, as
``torch.utils.flop_counter`` counts them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from codegen.networks import (
    FOLDED_TEXT,
    TEXT,
    Maker,
    Network,
    attention,
    diffusers_network,
    our_network,
)
from live_bytes import LiveBytes

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
}
"""Two single blocks, for ours treats the last one differently: the peak is the first one's."""
