"""The losses of joint training: flow matching, patch colours, contrast, alignment, guidance.

Knows the model and the autoencoder's latents; knows no files, no optimizer and no schedule.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.random import Generator
from torch import Tensor, nn

from redux_pipelines import sampling
from redux_pipelines.sampling import Grid
from training import autoencoder as ae
from training import flow
from training.alignment import AlignmentLoss
from training.flow import Conditions
from training.model import MiniModel
from training.precision import autocast
from training.scenes import Examples, SceneSource, Words

_PATCH = 4
_CONTRAST_WIDTH = 64
_CONTRASTED = 16
_COLOUR_WEIGHT = 0.2
_CONTRAST_WEIGHT = 0.05
_MOST_GUIDANCE = 19.0


class Auxiliary(nn.Module):
    """Heads on SigLIP's features that only training needs."""

    def __init__(self, encoder_width: int) -> None:
        super().__init__()
        self.colours = nn.Linear(encoder_width, 3 * _PATCH**2)
        self.contrast = nn.Linear(encoder_width, _CONTRAST_WIDTH)
        self.temperature = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-5.0))

    def colour_loss(self, features: Tensor, pictures: Tensor) -> Tensor:
        """Squared error of 4 × 4 colours predicted from each feature ``(B, N, E)``."""
        side = math.isqrt(features.shape[1])
        small = F.adaptive_avg_pool2d(pictures, _PATCH * side)
        patches = F.unfold(small, _PATCH, stride=_PATCH).transpose(1, 2)
        return F.mse_loss(self.colours(features.float()), patches)

    def embed(self, features: Tensor) -> Tensor:
        """One unit vector ``(B, 64)`` per picture."""
        return F.normalize(self.contrast(features.float().mean(1)), dim=1)

    def contrast_loss(self, one: Tensor, other: Tensor, concepts: Tensor) -> Tensor:
        """SigLIP's sigmoid loss (Zhai et al., arXiv:2303.15343) between two views ``(B, N, E)``."""
        same = torch.where(concepts[:, None] == concepts[None, :], 1.0, -1.0)
        scores = self.embed(one) @ self.embed(other).T * self.temperature.exp() + self.bias
        return -F.logsigmoid(same * scores).sum(1).mean()


@dataclass(frozen=True, slots=True)
class Schedule:
    """What changes over a run, at one of its steps.

    ``alignment`` weighs the alignment loss; ``guides`` switches model guidance on;
    ``shows_pictures`` off trains on text alone.
    """

    alignment: float
    guides: bool
    shows_pictures: bool


class Objective:
    """Computes the loss of one batch."""

    def __init__(
        self,
        model: MiniModel,
        auxiliary: Auxiliary,
        autoencoder: AutoencoderKL,
        source: SceneSource,
        words: Words,
    ) -> None:
        self._model, self._auxiliary, self._autoencoder = model, auxiliary, autoencoder
        self._source, self._words = source, words
        self._alignment = AlignmentLoss(model)

    @property
    def cell(self) -> int:
        """Core pixels per token along each side."""
        return int(sampling.PATCH * 2 ** (len(self._autoencoder.config.block_out_channels) - 1))

    def __call__(
        self, rng: Generator, grid: Grid, count: int, now: Schedule
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss and its parts for ``count`` new examples; draws from torch's generator too."""
        examples = self._source.draw(rng, grid, self.cell, count=count)
        latents = self._latents(examples.targets)
        recording = self._alignment.recording() if now.alignment > 0 else nullcontext()
        with autocast(), recording:
            features, given = self._conditions(rng, examples, now)
            flow_loss = self._flow_loss(latents, given, grid, now)
        loss, parts = flow_loss, {"flow": flow_loss.item()}
        if features is None:
            return loss, {"flow_of_text": flow_loss.item()}
        for name, weight, value in self._auxiliary_losses(rng, examples, features):
            loss, parts[name] = loss + weight * value, value.item()
        if now.alignment > 0:
            aligned = self._alignment(grid, len(examples.concepts))
            loss, parts["alignment"] = loss + now.alignment * aligned, aligned.item()
        return loss, parts

    def _latents(self, targets: Tensor) -> Tensor:
        """Scaled latent tokens ``(B, L, C)``."""
        config = self._autoencoder.config
        latents = ae.encode(self._autoencoder, targets)
        return sampling.pack((latents - config.shift_factor) * config.scaling_factor)

    def _conditions(
        self, rng: Generator, examples: Examples, now: Schedule
    ) -> tuple[Tensor | None, Conditions]:
        clip_ids, t5_ids = self._words.ids(examples.captions)
        is_given = self._words.are_given(rng, examples.captions)
        tokens, pooled = self._model.encode_text(clip_ids, t5_ids, is_given)
        if not now.shows_pictures:
            return None, Conditions(tokens, pooled)
        features, redux = self._model.encode_pictures(examples.inputs)
        return features, Conditions(torch.cat([tokens.to(redux.dtype), redux], 1), pooled)

    def _flow_loss(self, img: Tensor, given: Conditions, grid: Grid, now: Schedule) -> Tensor:
        count = len(img)
        noise = torch.randn_like(img)
        times = flow.shift_times(torch.sigmoid(torch.randn(count)), grid.tokens)
        noisy = flow.add_noise(img, noise, times)
        guidance = 1 + _MOST_GUIDANCE * torch.rand(count) ** 2
        target = noise - img
        if now.guides:
            target = target + self._guidance_push(noisy, times, guidance, given, grid)
        velocity = flow.predict(self._model, noisy, times, guidance, given, grid)
        return F.mse_loss(velocity, target)

    @torch.no_grad()
    def _guidance_push(
        self, noisy: Tensor, times: Tensor, guidance: Tensor, given: Conditions, grid: Grid
    ) -> Tensor:
        """What guidance adds to the target: model guidance (Tang et al., arXiv:2502.12154).

        The difference that the conditions make, times the strength that ``guidance`` stands for.
        """
        ones = torch.ones_like(guidance)
        length = self._model.sizes.text_tokens
        nothing = Conditions(
            torch.zeros_like(given.tokens[:, :length]), torch.zeros_like(given.pooled)
        )
        steered = flow.predict(self._model, noisy, times, ones, given, grid)
        free = flow.predict(self._model, noisy, times, ones, nothing, grid)
        strength = flow.guidance_strength(guidance) - 1
        return strength[:, None, None] * (steered - free)

    def _auxiliary_losses(
        self, rng: Generator, examples: Examples, features: Tensor
    ) -> list[tuple[str, float, Tensor]]:
        concepts = examples.concepts[:_CONTRASTED]
        colours = self._auxiliary.colour_loss(features, examples.inputs)
        losses = [("colours", _COLOUR_WEIGHT, colours)]
        if len(concepts) > 0:
            views = self._source.other_views(rng, concepts)
            with autocast():
                other, _ = self._model.encode_pictures(views)
            contrast = self._auxiliary.contrast_loss(
                features[: len(concepts)], other, torch.from_numpy(np.asarray(concepts))
            )
            losses.append(("contrast", _CONTRAST_WEIGHT, contrast))
        return losses
