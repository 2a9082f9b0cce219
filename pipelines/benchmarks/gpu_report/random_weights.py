"""Random weights of a network's own shapes, each drawn on the device when it is asked for.

Drawn from generators of their own, seeded by name: the same numbers in any order and however often,
so that two networks can be given the same ones, one tensor at a time. Scaled so that numbers keep
their size through any number of layers. Knows no files.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn


class RandomTensors(Mapping[str, Tensor]):
    """The tensors of diffusers' FLUX transformer of ``config``, in diffusers' names.

    Numbers are those of bfloat16 whatever ``dtype`` they come in, so that networks in two dtypes
    have the same weights.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        with torch.device("meta"):
            model = FluxTransformer2DModel(**config)
        self._shapes = {name: each.shape for name, each in model.state_dict().items()}
        self._device, self._dtype = device, dtype

    def __getitem__(self, key: str) -> Tensor:
        """Draw one tensor."""
        return random_tensor(key, self._shapes[key], self._device).to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._shapes)

    def __len__(self) -> int:
        """Tensors."""
        return len(self._shapes)


def random_tensor(name: str, shape: torch.Size, device: torch.device) -> Tensor:
    """Numbers for the parameter called ``name``, in bfloat16 on ``device``."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    made = torch.empty(shape, dtype=torch.bfloat16, device=device)
    mean, deviation = _normal_for(name, shape)
    return made.normal_(mean, deviation, generator=generator)


def _normal_for(name: str, shape: torch.Size) -> tuple[float, float]:
    """Mean and deviation: matrices by their inputs, norms near 1, other vectors near 0."""
    if len(shape) > 1:
        return 0.0, shape[1:].numel() ** -0.5
    if "norm" in name and name.endswith("weight"):
        return 1.0, 0.05
    return 0.0, 0.02


@torch.no_grad()
def filled(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """``module``, made on the meta device, on ``device`` in ``dtype`` with random weights.

    Buffers that are made from numbers alone and would stay as memory was: position ids.
    """
    module = nn.Module.to(module, dtype).to_empty(device=device)  # diffusers' own ``to`` warns
    for name, parameter in module.named_parameters():
        parameter.copy_(random_tensor(name, parameter.shape, device))
    for name, buffer in module.named_buffers():
        if not name.endswith("position_ids"):
            raise ValueError(f"{type(module).__name__} has a buffer {name} that nothing fills")
        buffer.copy_(torch.arange(buffer.numel(), device=device).view(buffer.shape))
    return module.eval().requires_grad_(False)
