"""Which transformer runs: one in the model's dtype, or one with weights in fp8.

Depends on what was asked for (``transformer_dtype``), on what the checkpoint holds and on what the
device can do. Knows no files.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from redux_pipelines.errors import WeightsError
from redux_pipelines.fp8 import self_test
from redux_pipelines.fp8.weights import Dequantized, Quantized, is_fp8
from redux_pipelines.loading.flux_weights import fp8_layers
from redux_pipelines.network.flux import FluxParams

logger = logging.getLogger(__name__)

TRANSFORMER_DTYPES = ("auto", "same", "fp8")
"""``auto``: as the checkpoint is, where the device can; ``same``: the model's dtype; ``fp8``."""


def check_transformer_dtype(
    wanted: str, backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    """Raise ``ValueError`` if ``wanted`` is not known, or is fp8 where that cannot run."""
    if wanted not in TRANSFORMER_DTYPES:
        raise ValueError(
            f"transformer_dtype={wanted!r} is not one of {', '.join(TRANSFORMER_DTYPES)}"
        )
    if wanted != "fp8":
        return
    if backend != "engine":
        raise ValueError(f"transformer_dtype='fp8' needs the engine backend; this one is {backend}")
    reason = self_test.refusal(device, dtype)
    if reason is not None:
        raise ValueError(f"transformer_dtype='fp8' cannot run on {device}: {reason}")
    logger.info("fp8: the self-test passed on %s", device)


def refuse_fp8_files(config: Mapping[str, Any]) -> None:
    """Raise ``WeightsError`` for a checkpoint in fp8, of which diffusers knows nothing."""
    if is_fp8(config):
        raise WeightsError(
            "the transformer's weights are in fp8, which the diffusers backend cannot read: use "
            "--backend engine, or the checkpoint they were made from"
        )


def choose_tensors(
    wanted: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Mapping[str, Tensor]:
    """A view of a checkpoint's ``tensors`` that has scales exactly if the network runs in fp8.

    Of files in fp8, ``auto`` makes weights in ``dtype``, with a warning, where fp8 cannot run, and
    on a CPU, where it runs but is slow. ``fp8`` was checked before.
    """
    if not is_fp8(config):
        if wanted == "fp8":
            return Quantized(tensors, fp8_layers(FluxParams.of(config)), device)
        return tensors
    if wanted == "fp8":
        return tensors
    if wanted == "auto":
        reason = "fp8 is slow on a CPU" if device.type == "cpu" else None
        reason = reason or self_test.refusal(device, dtype, FluxParams.of(config).hidden_size)
        if reason is None:
            return tensors
        name = str(dtype).removeprefix("torch.")
        logger.warning("the weights in fp8 are widened to %s as they load: %s", name, reason)
    return Dequantized(tensors, dtype)
