"""From a prompt to FLUX's text conditioning: T5 tokens and CLIP's pooled vector.

The encoders (10 GB for the real model) are loaded when the first prompt needs them; an empty
prompt is zeros of the transformer's sizes and needs none. Knows no images and no transformer.
"""

import json
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redux_pipelines.conditioning.tokens import Tokens
from redux_pipelines.errors import RequestError
from redux_pipelines.lru import LRU, tensor_bytes
from redux_pipelines.memory.offload import OnDemand

logger = logging.getLogger(__name__)

COMPONENTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
CLIP_TOKENS = 77

CACHE_BYTES = 64 * 2**20
"""Fifteen prompts of FLUX.1-dev in bfloat16."""


@dataclass(frozen=True, slots=True)
class TextSizes:
    """What the transformer expects: token width, pooled width, tokens per prompt."""

    token_width: int
    pooled_width: int
    tokens: int

    @classmethod
    def of(cls, transformer_config: Mapping[str, Any], base: Path) -> "TextSizes":
        """Sizes for the checkpoint in ``base``.

        512 tokens for guidance-distilled models (FLUX.1-dev), 256 for others (schnell), fewer
        where the tokenizer on disk allows fewer.
        """
        longest = 512 if transformer_config.get("guidance_embeds") else 256
        return cls(
            token_width=transformer_config["joint_attention_dim"],
            pooled_width=transformer_config["pooled_projection_dim"],
            tokens=min(longest, _model_max_length(base / "tokenizer_2", longest)),
        )


class TextEncoders:
    """CLIP and T5 of one checkpoint directory, loaded on first use; recent prompts are kept.

    ``on_demand``: once loaded they stay in host memory, and are on the device only while a prompt
    is encoded, T5 layer by layer.
    """

    def __init__(
        self,
        base: Path,
        sizes: TextSizes,
        *,
        device: torch.device,
        dtype: torch.dtype,
        on_demand: bool = False,
    ) -> None:
        self._on_demand = on_demand
        self._base = base
        self._sizes = sizes
        self._device = device
        self._dtype = dtype
        self.cache: LRU[tuple[str, int], tuple[Tensor, Tensor]] = LRU(
            CACHE_BYTES, lambda encoded: tensor_bytes(*encoded)
        )

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the text components that are neither loaded nor on disk."""
        if self.__dict__.keys() >= {"_clip", "_t5"}:
            return ()
        return tuple(name for name in COMPONENTS if not (self._base / name).is_dir())

    @property
    def is_loaded(self) -> bool:
        """Whether one of the encoders occupies memory."""
        return "_clip" in self.__dict__ or "_t5" in self.__dict__

    def load(self) -> None:
        """Load both encoders now. Raises ``RequestError`` where they are not on disk."""
        self.require()
        _ = self._clip, self._t5

    def require(self) -> None:
        """Raise ``RequestError`` unless prompts can be encoded."""
        if self.missing:
            raise RequestError(
                f"this server was loaded without text encoders ({', '.join(self.missing)} are "
                f"missing from {self._base.name or self._base}): send an empty prompt with "
                "empty_prompt='zeros', or add these folders to the checkpoint"
            )

    def zeros(self) -> tuple[Tokens, Tensor]:
        """What stands for no prompt: zero tokens and a zero pooled vector."""
        token = torch.zeros(1, self._sizes.token_width, device=self._device, dtype=self._dtype)
        vec = torch.zeros(self._sizes.pooled_width, device=self._device, dtype=self._dtype)
        return Tokens(token, copies=self._sizes.tokens), vec

    @torch.inference_mode()
    def encode(self, prompt: str) -> tuple[Tokens, Tensor]:
        """T5 tokens ``(T, D)`` and CLIP's pooled vector ``(P,)``; longer prompts are cut off.

        The same for the same prompt, and not to be changed. Raises ``RequestError`` where the
        encoders are not on disk.
        """
        self.require()
        key = (prompt, self._sizes.tokens)
        txt, vec = self.cache.get(key, lambda: self._embed(prompt))
        return Tokens(txt), vec

    def _embed(self, prompt: str) -> tuple[Tensor, Tensor]:
        tokenizer, clip, presence = self._clip
        ids = _token_ids(tokenizer, prompt, _clip_length(tokenizer))
        with presence:
            vec = clip(ids.to(self._device)).pooler_output[0]
        tokenizer, t5, presence = self._t5
        ids = _token_ids(tokenizer, prompt, self._sizes.tokens)
        with presence:
            txt = t5(ids.to(self._device)).last_hidden_state[0]
        return txt.to(self._dtype), vec.to(self._dtype)

    @cached_property
    def _clip(self) -> tuple[Any, Any, Any]:
        from transformers import CLIPTextModel, CLIPTokenizer

        return self._load(CLIPTokenizer, "tokenizer", CLIPTextModel, "text_encoder")

    @cached_property
    def _t5(self) -> tuple[Any, Any, Any]:
        from transformers import T5EncoderModel, T5Tokenizer

        return self._load(T5Tokenizer, "tokenizer_2", T5EncoderModel, "text_encoder_2")

    def _load(
        self, tokenizer_class: Any, tokenizer: str, model_class: Any, model: str
    ) -> tuple[Any, Any, Any]:
        """Tokenizer, model, and what to enter for as long as the model must be there."""
        logger.info("loading %s", model)
        loaded = model_class.from_pretrained(self._base / model, dtype=self._dtype)
        loaded = loaded.eval().requires_grad_(False)
        made = tokenizer_class.from_pretrained(self._base / tokenizer)
        if not self._on_demand:
            return made, loaded.to(self._device), nullcontext()
        layers = loaded.encoder.block if model == "text_encoder_2" else ()
        return made, loaded, OnDemand(loaded, self._device, layers)


def _token_ids(tokenizer: Any, prompt: str, length: int) -> Tensor:
    """Token ids ``(1, length)``, padded or cut off."""
    encoded = tokenizer(
        prompt,
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
        return_attention_mask=False,
    )
    ids: Tensor = encoded.input_ids
    return ids


def _clip_length(tokenizer: Any) -> int:
    """CLIP has 77 positions, whatever larger number a tokenizer's config may state."""
    return min(CLIP_TOKENS, int(tokenizer.model_max_length))


def _model_max_length(tokenizer: Path, default: int) -> int:
    """``model_max_length`` of a saved tokenizer, read without loading it."""
    path = tokenizer / "tokenizer_config.json"
    if not path.is_file():
        return default
    return int(json.loads(path.read_text()).get("model_max_length", default))
