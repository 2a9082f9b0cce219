"""Two views of a transformer's tensors in diffusers' naming: some weights in e4m3, and back.

A quantised layer keeps its name; ``NAME.weight`` is e4m3 and ``NAME.weight_scale`` holds a float32
per row. Both views convert a tensor when it is asked for, some rows at a time, so that nothing is
held twice. Also what ``config.json`` says of such a checkpoint. Knows no files and no modules.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from redux_kernels.reference import quantize_rows
from redux_pipelines.errors import WeightsError
from redux_pipelines.fp8.linear import E4M3

METHOD = "flux_redux_fp8"
FORMAT = 1
CONFIG_KEY = "quantization_config"
"""Where diffusers, too, looks for how a checkpoint is quantised; it does not know ours."""

WEIGHT, SCALE = ".weight", ".weight_scale"
_PART_ELEMENTS = 2**22  # float32 copies of 16 MiB


def is_fp8(config: Mapping[str, Any]) -> bool:
    """Whether a transformer's ``config.json`` says that its files are ours in fp8.

    Raises ``WeightsError`` if they are quantised in a way that we do not read.
    """
    entry = config.get(CONFIG_KEY)
    if entry is None:
        return False
    method, version = entry.get("quant_method"), entry.get("format")
    if method != METHOD:
        raise WeightsError(
            f"the transformer is quantised by {method!r}, which is not read here: give the "
            "original weights, or what `flux-redux weights quantize` makes of them"
        )
    if version != FORMAT:
        raise WeightsError(
            f"the transformer is in fp8 format {version!r}, and this version reads {FORMAT}: "
            "install a newer one, or run `flux-redux weights quantize` again"
        )
    return True


class Quantized(Mapping[str, Tensor]):
    """``tensors`` with the weights of ``layers`` (names without ``.weight``) in e4m3.

    Quantised on ``device``. A weight's scale is kept from when the weight is asked for until the
    scale is, so that weights are read once.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], layers: Collection[str], device: torch.device
    ) -> None:
        self._tensors, self._layers, self._device = tensors, frozenset(layers), device
        self._scales: dict[str, Tensor] = {}

    def __getitem__(self, key: str) -> Tensor:
        """A tensor, or a scale."""
        layer = key.removesuffix(SCALE)
        if key != layer and layer in self._layers:
            if layer not in self._scales:
                self[layer + WEIGHT]
            return self._scales.pop(layer)
        if not self.is_quantized(key):
            return self._tensors[key]
        layer = key.removesuffix(WEIGHT)
        weight, self._scales[layer] = quantize_weight(self._tensors[key], self._device)
        return weight

    def is_quantized(self, key: str) -> bool:
        """Whether ``key`` is a weight that comes in e4m3."""
        return key.endswith(WEIGHT) and key.removesuffix(WEIGHT) in self._layers

    def __iter__(self) -> Iterator[str]:
        """Names; a scale follows its weight."""
        for key in self._tensors:
            yield key
            if self.is_quantized(key):
                yield key.removesuffix(WEIGHT) + SCALE

    def __len__(self) -> int:
        """Tensors and scales."""
        return sum(1 for _ in self)


class Dequantized(Mapping[str, Tensor]):
    """``tensors`` of a checkpoint in fp8, with weights in ``dtype`` and no scales."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._tensors, self._dtype = tensors, dtype

    def __getitem__(self, key: str) -> Tensor:
        """A tensor; scales are not found."""
        if key.endswith(SCALE):
            raise KeyError(key)
        tensor, scale = self._tensors[key], key.removesuffix(WEIGHT) + SCALE
        if not key.endswith(WEIGHT) or scale not in self._tensors:
            return tensor
        return dequantize_weight(tensor, self._tensors[scale], self._dtype)

    def __iter__(self) -> Iterator[str]:
        """Names, without those of scales."""
        return (key for key in self._tensors if not key.endswith(SCALE))

    def __len__(self) -> int:
        """Tensors without scales."""
        return sum(1 for _ in self)


def quantize_weight(weight: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """``(out, in)`` in e4m3 and ``(out, 1)`` in float32, on ``device``."""
    made = torch.empty(weight.shape, dtype=E4M3, device=device)
    scale = torch.empty(len(weight), 1, device=device)
    for rows in _parts(weight):
        made[rows], scale[rows] = quantize_rows(weight[rows].to(device))
    return made, scale


def dequantize_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight · scale`` in ``dtype``, from products in float32."""
    made = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows in _parts(weight):
        made[rows] = weight[rows].float().mul_(scale[rows])
    return made


def _parts(weight: Tensor) -> Iterator[slice]:
    count = max(1, _PART_ELEMENTS // weight.shape[1])
    return (slice(first, first + count) for first in range(0, len(weight), count))
