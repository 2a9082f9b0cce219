"""The transformer behind a small interface: prepare a request, start a run per batch, predict.

``prepare`` receives all that stays the same over the steps, so that a faster backend can embed the
text once, compute every modulation of the schedule in one go, keep RoPE tables per grid and fold
equal text tokens. A run holds what one step leaves to the next. ``redux_pipelines.engine`` does all
this; ``DiffusersDenoiser`` runs diffusers' own network, does none of it, and is what the engine is
measured against. Knows no images and no sampling loop.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from redux_pipelines.lru import LRU
from redux_pipelines.quality import Tier
from redux_pipelines.sampling import Grid, Schedule, image_ids
from redux_pipelines.tokens import Conditioning
from redux_pipelines.types import Quality


class Run(Protocol):
    """One pass over all steps of a schedule, of one batch of images.

    It is begun for that batch alone, and whoever lets go of it frees what it holds.
    """

    @property
    def reused(self) -> int:
        """Steps so far that reused a part of an earlier one."""
        ...

    def predict(self, img: Tensor, step: int) -> Tensor:
        """Velocity of ``img (B, L, C)`` at ``step``; steps come in their order, each once."""
        ...


class PreparedDenoiser(Protocol):
    """A transformer made ready for one conditioning, schedule and grid. Not shared by requests."""

    def predict(self, img: Tensor, step: int) -> Tensor:
        """Exact velocity of ``img (B, L, C)`` at step ``step``, same shape and dtype."""
        ...

    def start(self, tier: Tier) -> Run:
        """Begin a run. ``tier`` is one of those that the denoiser's ``qualities`` name."""
        ...


@dataclass(frozen=True, slots=True)
class ExactRun:
    """A ``Run`` that computes every step."""

    prepared: PreparedDenoiser

    @property
    def reused(self) -> int:
        """None."""
        return 0

    def predict(self, img: Tensor, step: int) -> Tensor:
        """See ``Run``."""
        return self.prepared.predict(img, step)


class Denoiser(Protocol):
    """A loaded transformer. Holds no state of a request."""

    @property
    def name(self) -> str:
        """Backend name for ``ModelInfo``."""
        ...

    @property
    def attention(self) -> str:
        """What computes its attention, for ``ModelInfo``."""
        ...

    @property
    def qualities(self) -> tuple[Quality, ...]:
        """The tiers it has."""
        ...

    @property
    def caches(self) -> Mapping[str, LRU[Any, Any]]:
        """What it keeps between requests, by name."""
        ...

    def prepare(
        self, conditioning: Conditioning, schedule: Schedule, grid: Grid
    ) -> PreparedDenoiser:
        """Compute what does not change over the steps of a request."""
        ...


class DiffusersDenoiser:
    """diffusers' ``FluxTransformer2DModel``, called as ``FluxPipeline`` calls it.

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

        Raises ``ValueError`` for tokens with a weight, of which diffusers knows nothing.
        """
        model = self._transformer
        sets = conditioning.present()
        if any(each.log_weight != 0.0 for each in sets):
            raise ValueError("weights of tokens need the engine backend; this one is diffusers")
        txt = torch.cat([each.expanded() for each in sets])
        txt = txt.to(model.device, model.dtype)
        embeds_guidance = model.config.guidance_embeds
        return _PreparedDiffusers(
            transformer=model,
            txt=txt,
            vec=conditioning.vec.to(model.device, model.dtype),
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


@dataclass(frozen=True, slots=True)
class _PreparedDiffusers:
    transformer: Any
    txt: Tensor
    vec: Tensor
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
            return_dict=False,
        )[0]
        return velocity

    def start(self, tier: Tier) -> Run:
        if tier.cache is not None:
            raise ValueError("a step cache needs the engine backend; this one is diffusers")
        return ExactRun(self)
