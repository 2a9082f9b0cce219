"""FLUX.1-dev's transformer at full width with any number of blocks: diffusers', ours, operators.

As functions of nothing but tensors, which have no memory: they are made in the current fake mode,
or on the meta device. Attention is one opaque operator unless another is given: which
implementation runs is another matter, and none of them is generated.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BF16 = torch.bfloat16
IMAGE = 4096
"""Rows of a picture of 1024 × 1024."""

PICTURE = 729
TEXT = 512 + PICTURE
"""Text and Redux tokens; 5337 rows with the image's."""

FOLDED_TEXT = 6 + 1 + PICTURE
"""The same with equal text tokens as one row, filled up: 4832 rows, a multiple of 16."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Network = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function of nothing but the tensors beside it."""


@torch.library.custom_op("redux_tests::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``(B, heads, Q, D)``, its rows before its heads in memory, as flash attentions leave it."""
    raise NotImplementedError


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, rows, d = q.shape
    return q.new_empty(batch, rows, heads, d).transpose(1, 2)


@torch.library.custom_op("redux_tests::place", mutates_args=("into",))
def place(out: Tensor, into: Tensor) -> None:
    """``into = out``: what an attention that cannot write there does, unseen by the compiler."""
    raise NotImplementedError


@place.register_fake
def _(out: Tensor, into: Tensor) -> None:
    pass


def make_attention_opaque() -> None:
    """Let diffusers' network call the operator. For a process of its own."""
    F.scaled_dot_product_attention = lambda query, key, value, **_: attention(query, key, value)


@dataclass(frozen=True)
class Maker:
    """Makes bfloat16 tensors and modules on one device without filling them."""

    device: str

    def __call__(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def placed(self, module: nn.Module) -> nn.Module:
        """A module from the meta device with weights here (``Module.to`` cannot do that)."""
        for part in module.modules():
            for name, weight in list(part._parameters.items()):
                if weight is not None:
                    part._parameters[name] = nn.Parameter(self(*weight.shape), requires_grad=False)
        return module.eval()


def diffusers_network(doubles: int, singles: int, make: Maker, text: int = TEXT) -> Network:
    """A step of diffusers' ``FluxTransformer2DModel``, RoPE tables and modulations with it."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(
            guidance_embeds=True, num_layers=doubles, num_single_layers=singles
        )
    model = make.placed(model)
    given = {
        "hidden_states": make(1, IMAGE, 64),
        "encoder_hidden_states": make(1, text, 4096),
        "pooled_projections": make(1, 768),
        "timestep": make(1),
        "guidance": make(1, dtype=torch.float32),
        "img_ids": make(IMAGE, 3, dtype=torch.float32),
        "txt_ids": make(text, 3, dtype=torch.float32),
    }

    def run(*tensors: Tensor) -> Any:
        return model(**dict(zip(given, tensors, strict=True)), return_dict=False)

    return run, tuple(given.values())


def our_network(
    doubles: int, singles: int, make: Maker, text: int = TEXT, attend: Attend = attention
) -> Network:
    """A step of the engine's ``Flux``: text is embedded and modulations are made before it.

    On kernels. A folded text token's copies are added by one more after attention, which writes the
    result beside the MLP; without them it is copied there, as no flash attention does it.
    """
    from redux_pipelines.attention.groups import KeyGroup, merged
    from redux_pipelines.network.flux import BlockContext, Flux, FluxParams
    from redux_pipelines.network.layers import Rope
    from redux_pipelines.network.modulation import DOUBLE_ROWS, FINAL_ROWS, SINGLE_ROWS
    from redux_pipelines.network.operators import KernelOperators

    with torch.device("meta"):
        flux = Flux(FluxParams(depth=doubles, depth_single_blocks=singles))
    flux = make.placed(flux)
    rows, hidden = text + IMAGE, FOLDED_TEXT - PICTURE - 1
    groups = (
        KeyGroup(hidden, -math.inf),
        KeyGroup(1, math.log(512)),
        KeyGroup(rows - hidden - 1, 0.0),
    )

    def partial(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attend(q, k, v), q.new_empty(*q.shape[:3], 1, dtype=torch.float32)

    def attend_groups(
        q: Tensor, k: Tensor, v: Tensor, _: Any, into: Tensor | None = None
    ) -> Tensor:
        if text == FOLDED_TEXT:
            return merged(partial, (q, k, v), groups, into)
        out = attend(q, k, v)
        if into is None:
            return out
        place(out, into)
        return into

    def run(img: Tensor, txt: Tensor, mod: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        context = BlockContext(txt, Rope(cos, sin), groups, attend_groups, KernelOperators())
        return flux(img, txt, mod, context)

    table = make(2 * DOUBLE_ROWS * doubles + SINGLE_ROWS * singles + FINAL_ROWS, 3072)
    angles = [make(rows, 64, dtype=torch.float32) for _ in range(2)]
    return run, (make(1, IMAGE, 64), make(text, 3072), table, *angles)


def operators_network(doubles: int, singles: int, make: Maker, text: int = TEXT) -> Network:
    """Blocks of our operators and linears alone, without what stands around them."""
    from flux_blocks import FLUX, DoubleBlock, SingleBlock

    with torch.device("meta"):
        double = nn.ModuleList(DoubleBlock(FLUX) for _ in range(doubles))
        single = nn.ModuleList(SingleBlock(FLUX) for _ in range(singles))
    make.placed(nn.ModuleList([*double, *single]))

    def run(txt: Tensor, img: Tensor, cos: Tensor, sin: Tensor, mod: Tensor) -> Any:
        streams = txt, txt, img, img  # each with its next norm, which is anything here
        for block in double:
            streams = block(*streams, cos, sin, mod)
        x, h = (torch.cat(each, dim=1) for each in (streams[::2], streams[1::2]))
        for block in single:
            x, h = block(x, h, cos, sin, mod[:, : 3 * 3072])
        return x, h

    angles = [make(text + IMAGE, 64, dtype=torch.float32) for _ in range(2)]
    rows = make(1, text, 3072), make(1, IMAGE, 3072)
    return run, (*rows, *angles, make(1, 6 * 3072))
