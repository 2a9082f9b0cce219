"""The transformer backend ``diffusers``: diffusers' own network, called as its pipeline calls it.

Saves nothing: it is the reference that the engine is tested and measured against. Knows no images
and no sampling loop.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from redux_pipelines.conditioning.tokens import Conditioning, Tokens
from redux_pipelines.contract.types import Quality
from redux_pipelines.denoising.denoiser import PreparedDenoiser, Run
from redux_pipelines.denoising.quality import Tier
from redux_pipelines.lru import LRU
from redux_pipelines.sampling import Grid, Schedule, image_ids


class DiffusersDenoiser:
    """``FluxTransformer2DModel``, called as ``FluxPipeline`` calls it.

    A model without guidance embedding (FLUX.1-schnell) is given none.
    """

    name = "diffusers"
    attention = "native"
    qualities: tuple[Quality, ...] = ("exact",)
    caches: Mapping[str, LRU[Any, Any]] = MappingProxyType({})

    def __init__(self, transformer: Any) -> None:
        self._transformer = transformer

    def prepare(
        self, conditioning: Conditioning, schedule: Schedule, grid: Grid
    ) -> "_PreparedDiffusers":
        """Write out the tokens and put positions, times and guidance on the device.

        Where tokens have a weight, every attention is given a bias per key, as a mask.
        """
        model = self._transformer
        sets = conditioning.present()
        txt = torch.cat([each.expanded() for each in sets])
        txt = txt.to(model.device, model.dtype)
        embeds_guidance = model.config.guidance_embeds
        return _PreparedDiffusers(
            transformer=model,
            txt=txt[None],
            vec=conditioning.vec.to(model.device, model.dtype)[None],
            bias=_key_bias(sets, grid.tokens, txt),
            txt_ids=torch.zeros(len(txt), 3, device=model.device),
            img_ids=image_ids(grid).to(model.device),
            # the scheduler's float32 arithmetic: time = sigma * 1000, fed back divided by 1000
            times=torch.tensor(schedule.sigmas[:-1], device=model.device) * 1000,
            guidance=(
                torch.tensor([conditioning.guidance], device=model.device)
                if embeds_guidance
                else None
            ),
        )

    def join(self, prepared: Sequence[PreparedDenoiser]) -> PreparedDenoiser:
        """Stack text, pooled text and guidance, which diffusers takes per image."""
        parts = [each for each in prepared if isinstance(each, _PreparedDiffusers)]
        if len({each.txt.shape for each in parts}) > 1:
            raise ValueError("requests with different numbers of tokens cannot share a batch")
        guidance = [each.guidance for each in parts if each.guidance is not None]
        return replace(
            parts[0],
            txt=torch.cat([each.txt for each in parts]),
            vec=torch.cat([each.vec for each in parts]),
            bias=_joined([each.bias for each in parts]),
            guidance=torch.cat(guidance) if guidance else None,
        )


def _key_bias(sets: Sequence[Tokens], img_rows: int, txt: Tensor) -> Tensor | None:
    """Of all keys ``(1, 1, 1, T + L)``; None where none has one.

    In float32 at least on a CPU. Attention on a GPU wants it in the dtype of its queries: in
    bfloat16 log 9 is off by so little that a token counts 0.3 % more or less.
    """
    if all(each.log_weight == 0.0 for each in sets):
        return None
    is_cpu = txt.device.type == "cpu"
    kind = torch.promote_types(txt.dtype, torch.float32) if is_cpu else txt.dtype
    bias = torch.zeros(1, 1, 1, len(txt) + img_rows, device=txt.device, dtype=kind)
    end = 0
    for each in sets:
        begin, end = end, end + len(each.values) * each.copies
        bias[..., begin:end] = each.log_weight
    return bias


def _joined(biases: Sequence[Tensor | None]) -> Tensor | None:
    given = [each for each in biases if each is not None]
    if not given:
        return None
    if len(given) < len(biases):
        raise ValueError("requests with weights of tokens cannot share a batch with others")
    return torch.cat(given)


@dataclass(frozen=True, slots=True)
class _PreparedDiffusers:
    """``txt (B, T, D)``, ``vec (B, P)``, ``guidance (B,)``; B is 1 if one serves all images.

    So it is with ``bias (B, 1, 1, S)``.
    """

    reused: ClassVar[int] = 0
    transformer: Any
    txt: Tensor
    vec: Tensor
    bias: Tensor | None
    txt_ids: Tensor
    img_ids: Tensor
    times: Tensor
    guidance: Tensor | None

    def predict(self, img: Tensor, step: int) -> Tensor:
        batch = len(img)
        velocity: Tensor = self.transformer(
            hidden_states=img,
            timestep=self.times[step].expand(batch).to(img.dtype) / 1000,
            guidance=None if self.guidance is None else self.guidance.expand(batch),
            pooled_projections=self.vec.expand(batch, -1),
            encoder_hidden_states=self.txt.expand(batch, -1, -1),
            txt_ids=self.txt_ids,
            img_ids=self.img_ids,
            joint_attention_kwargs=self._mask(batch),
            return_dict=False,
        )[0]
        return velocity

    def _mask(self, batch: int) -> dict[str, Tensor] | None:
        if self.bias is None:
            return None
        return {"attention_mask": self.bias.expand(batch, -1, -1, -1)}

    def start(self, tier: Tier) -> Run:
        if tier.cache is not None:
            raise ValueError("a step cache needs the engine backend; this one is diffusers")
        return self
