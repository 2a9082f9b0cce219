"""Trains transformer, SigLIP, Redux embedder and text encoders together.

    python -m training.train_model --minutes 150

Needs the data and the autoencoder's core. Resumes from its checkpoint; the first quarter sees
512 × 512 only, then come 1024 × 1024 and other shapes, and at last guidance. With ``--finished``
it begins with an exported model, as if the first of these stages were over. Knows no losses.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.random import Generator
from torch import Tensor, nn
from torch.compiler import set_stance
from torch.nn.attention import SDPBackend, sdpa_kernel

from redux_pipelines.sampling import Grid
from redux_weights.embedded import Checkpoint
from training import autoencoder, cli, vocabulary
from training.captions import all_captions
from training.dataset import TRAINING_PHOTOS, Icons, load_icons, load_photos
from training.model import MiniModel, is_matrix
from training.objectives import Auxiliary, Objective, Schedule
from training.optimizer import MuonAdamW, Rates
from training.probe import Probe
from training.progress import Average, TrainingClock, decay
from training.run import Run
from training.scenes import SceneSource, Words
from training.settings import JointSettings, ModelSizes, Sizes
from training.workplace import Workplace

_RATES = Rates(muon=0.01, adamw=1e-3, weight_decay=0.01)


@dataclass(frozen=True)
class Inputs:
    """What a run reads: the frozen core, the scenes and the words."""

    core: AutoencoderKL
    source: SceneSource
    words: Words
    clip_pieces: int
    t5_pieces: int


def schedule_at(
    rng: Generator, aligned_for: int, fraction: float, settings: JointSettings
) -> Schedule:
    """What to train after ``aligned_for`` steps of alignment, at ``fraction`` of the budget."""
    return Schedule(
        alignment=settings.alignment * max(0.0, 1 - aligned_for / settings.alignment_steps),
        guides=fraction >= settings.guides_from,
        shows_pictures=bool(rng.random() >= settings.text_only),
    )


def grid_at(rng: Generator, fraction: float, settings: JointSettings) -> Grid:
    """Which shape to train: the smallest square early, then a mix with up to three times it."""
    small, large, most = settings.grids
    kind = int(rng.choice(4, p=settings.shares))
    if fraction < settings.large_from or kind == 0:
        return Grid(small, small)
    if kind == 1:
        return Grid(large, large)
    if kind == 2:
        return Grid(*rng.permutation(rng.choice(settings.oblongs)).tolist())
    sides = np.exp(rng.uniform(math.log(small), math.log(most), 2)).round().astype(int).tolist()
    return Grid(*sides)


class Alignment:
    """Since which step attention is aligned, and whether that was for larger grids already.

    In a larger grid the same place has another position: it must be aligned anew.
    """

    def __init__(self) -> None:
        self.since, self.is_for_large = 0, False

    def skip(self, steps: int) -> None:
        """A finished model needs none: its attention is aligned, for large grids too."""
        self.since, self.is_for_large = -steps, True

    def update(self, step: int, *, sees_large: bool) -> int:
        """How many steps alignment has lasted at ``step``."""
        if sees_large and not self.is_for_large:
            self.since, self.is_for_large = step, True
        return step - self.since

    def state_dict(self) -> dict[str, Any]:
        """Both values."""
        return vars(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self.since, self.is_for_large = state["since"], state["is_for_large"]


class JointTraining(Run):
    """One run: the model, its average, the auxiliary heads and the optimizer."""

    def __init__(
        self,
        sizes: Sizes,
        inputs: Inputs,
        folder: Path,
        clock: TrainingClock,
        probe: Probe | None = None,
        finished: Checkpoint | None = None,
    ) -> None:
        """Begin anew, with a ``finished`` model, or where ``folder``'s checkpoint was saved."""
        super().__init__(folder, "model", clock, sizes.joint.cadence)
        torch.manual_seed(0)
        self._settings, self._inputs, self._probe = sizes.joint, inputs, probe
        self.model = self._fresh(sizes)
        self._aligned = Alignment()
        if finished is not None:
            load_finished(self.model, finished)
            clock.spent_s = sizes.joint.finished_at * clock.budget_s
            self._aligned.skip(sizes.joint.alignment_steps)
        self._averaged = self._fresh(sizes).eval().requires_grad_(False)
        self.auxiliary = Auxiliary(sizes.model.encoder_width)
        self.average = Average(self.model, sizes.joint.average)
        named = [*self.model.named_parameters(), *self.auxiliary.named_parameters()]
        self.optimizer = MuonAdamW(named, is_matrix, _RATES)
        if sizes.joint.compiles:
            self._compile()
        self._objective = Objective(
            self.model, self.auxiliary, inputs.core, inputs.source, inputs.words
        )
        self.keep(
            model=self.model,
            auxiliary=self.auxiliary,
            average=self.average,
            optimizer=self.optimizer,
            aligned=self._aligned,
        )

    def _fresh(self, sizes: Sizes) -> MiniModel:
        channels = sizes.autoencoder.latent_channels
        model = MiniModel(sizes.model, channels, self._inputs.clip_pieces, self._inputs.t5_pieces)
        mix_norms(model)
        return model

    def averaged(self) -> MiniModel:
        """The model with averaged weights, for use and for export."""
        self._averaged.load_state_dict(self.average.weights)
        return self._averaged

    def look(self) -> dict[str, float]:
        """Samples of held-out and trained icons, and what they are nearest to."""
        if self._probe is None:
            return {}
        sheet = self.checkpoint.parent / f"probe-{round(self.clock.spent_s / 60):04d}.png"
        small, large, _ = self._settings.grids
        grids = (Grid(small, small), Grid(large, large), Grid(*self._settings.oblongs[0]))
        return self._probe.look(self.averaged(), sheet, grids)

    def train_step(self) -> dict[str, float]:
        """One update; returns the parts of the loss. Depends on nothing but state and step."""
        rng = np.random.default_rng((2, self.step))
        torch.manual_seed(self.step)
        fraction = self.clock.fraction
        sees_large = fraction >= self._settings.large_from
        aligned_for = self._aligned.update(self.step, sees_large=sees_large)
        grid = grid_at(rng, fraction, self._settings)
        now = schedule_at(rng, aligned_for, fraction, self._settings)
        # the hooks that alignment reads attention with would split compiled graphs
        with _fast_attention(), set_stance("force_eager" if now.alignment > 0 else "default"):
            loss, parts = self._objective(rng, grid, self._count(grid), now)
            loss.backward()  # type: ignore[no-untyped-call]
        warmup = min(1.0, (self.step + 1) / 20)
        self.optimizer.step(warmup * decay(fraction, self._settings.constant_rate_until))
        self.average.update(self.model)
        self.step += 1
        if grid.tokens == self._settings.grids[0] ** 2:
            return parts
        return {f"{name}_of_larger": value for name, value in parts.items()}

    def _compile(self) -> None:
        """Compile the blocks, once for all shapes: a quarter more steps for two minutes."""
        transformer = self.model.transformer
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.compile(dynamic=True)

    def _count(self, grid: Grid) -> int:
        """As many examples as keep the number of tokens the same."""
        sizes = self.model.sizes
        beside = sizes.text_tokens + sizes.encoder_grid**2
        smallest = self._settings.grids[0] ** 2
        count = self._settings.batch * (smallest + beside) / (grid.tokens + beside)
        return max(2, int(count))


class _MixedNorm(nn.RMSNorm):
    """An RMS norm of bfloat16 features by float32 weights, without torch's slow detour."""

    def forward(self, features: Tensor) -> Tensor:
        power = features.float().pow(2).mean(-1, keepdim=True)
        scaled = (features * torch.rsqrt(power + (self.eps or 0.0))).to(features.dtype)
        return scaled * self.weight.to(features.dtype)


def mix_norms(model: nn.Module) -> None:
    """Make all RMS norms ``_MixedNorm``s."""
    for module in model.modules():
        if type(module) is nn.RMSNorm:
            module.__class__ = _MixedNorm


@contextmanager
def _fast_attention() -> Iterator[None]:
    """On CPUs and short sequences the plain kernel trains three times as fast as the fused one."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@torch.no_grad()
def load_finished(model: MiniModel, finished: Checkpoint) -> None:
    """Take over the weights of an exported model; raises what torch does if the sizes differ."""
    parts = {
        "transformer": finished.base,
        "text_encoder": finished.base,
        "text_encoder_2": finished.base,
        "image_encoder": finished.redux,
        "image_embedder": finished.redux,
    }
    for name, folder in parts.items():
        part = getattr(model, name)
        part.load_state_dict(type(part).from_pretrained(folder / name).state_dict())


def make_words(place: Workplace, icons: Icons, sizes: ModelSizes) -> tuple[Words, int, int]:
    """The tokenizers, learnt and saved at the first call, and their sizes in pieces."""
    if not (place.model / "tokenizer_2").is_dir():
        texts = list(all_captions(icons.names))
        clip = vocabulary.learn_clip(texts, vocabulary.CLIP_PIECES, sizes.text_tokens)
        t5 = vocabulary.learn_t5(texts, vocabulary.T5_PIECES, sizes.text_tokens)
        vocabulary.save(place.model, clip, t5)
    clip, t5 = vocabulary.load(place.model)
    return Words(clip, t5, sizes.text_tokens), len(clip), len(t5)


def prepare(place: Workplace, sizes: Sizes) -> tuple[Inputs, Icons]:
    """Read what a run needs: the data, the finished core, the tokenizers."""
    icons = load_icons(place.data, sizes.held_out)
    photos = load_photos(place.photos, tuple(TRAINING_PHOTOS))
    words, clip_pieces, t5_pieces = make_words(place, icons, sizes.model)
    source = SceneSource(icons, photos, icons.training_rows, sizes.model.encoder_side)
    core = autoencoder.load(place.core)
    return Inputs(core, source, words, clip_pieces, t5_pieces), icons


def train(
    place: Workplace, sizes: Sizes, clock: TrainingClock, finished: Path | None = None
) -> JointTraining:
    """Train, or go on with what was begun, until the clock's budget is spent.

    ``finished`` holds an exported model (``base`` and ``redux``) to begin with, instead of nothing.
    """
    start = None if finished is None else Checkpoint(finished / "base", finished / "redux")
    if start is not None:
        vocabulary.save(place.model, *vocabulary.load(start.base))
    inputs, icons = prepare(place, sizes)
    count = min(16, len(icons.held_out_rows))
    probe = Probe(icons, inputs.core, sizes.model.encoder_side, count)
    training = JointTraining(sizes, inputs, place.model, clock, probe, start)
    training.run()
    return training


def main() -> None:
    """Command line."""
    parser = cli.parser(__doc__)
    parser.add_argument("--finished", type=Path, help="folder of an exported model to begin with")
    options, given = cli.parse(parser, minutes=150.0)
    train(options.place, options.sizes, options.clock, given.finished)


if __name__ == "__main__":
    main()
