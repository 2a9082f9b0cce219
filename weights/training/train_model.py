"""Trains transformer, SigLIP, Redux embedder and text encoders together.

    python -m training.train_model --minutes 180

Needs the data and the autoencoder's core. Resumes from its checkpoint; the first quarter sees
512 × 512 only, then come 1024 × 1024 and other shapes, and at last guidance. Knows no losses.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.random import Generator
from torch import Tensor, nn
from torch.compiler import set_stance
from torch.nn.attention import SDPBackend, sdpa_kernel

from redux_pipelines.sampling import Grid
from training import autoencoder, cli, vocabulary
from training.captions import all_captions
from training.dataset import TRAINING_PHOTOS, Icons, load_icons, load_photos
from training.model import MiniModel, is_matrix
from training.objectives import Auxiliary, Objective, Schedule
from training.optimizer import MuonAdamW, Rates
from training.probe import Probe
from training.progress import (
    Average,
    Journal,
    TrainingClock,
    decay,
    load_checkpoint,
    save_checkpoint,
)
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


def schedule_at(rng: Generator, step: int, fraction: float, settings: JointSettings) -> Schedule:
    """What to train at ``step``, ``fraction`` of the budget being spent."""
    late = max(0.0, fraction - settings.large_from)
    aligning = max(0.0, 1 - step / settings.alignment_steps)
    if fraction >= settings.large_from:  # the same place is another position in a larger grid
        aligning = max(aligning, 1 - late / settings.realigned_in)
    return Schedule(
        alignment=settings.alignment * aligning,
        jitter=1 + late / (1 - settings.large_from),
        guides=fraction >= settings.guides_from,
        shows_pictures=bool(rng.random() >= settings.text_only),
    )


def grid_at(rng: Generator, fraction: float, settings: JointSettings) -> Grid:
    """Which shape to train: the smallest square early, then a mix with up to three times it."""
    small, large, most = settings.grids
    draw = rng.random()
    if fraction < settings.large_from or draw < 0.4:
        return Grid(small, small)
    if draw < 0.75:
        return Grid(large, large)
    sides = np.exp(rng.uniform(math.log(small), math.log(most), 2)).round().astype(int).tolist()
    return Grid(*sides)


class JointTraining:
    """One run: the model, its average, optimizer and clock, and how to save and restore them."""

    def __init__(self, sizes: Sizes, inputs: Inputs, folder: Path, clock: TrainingClock) -> None:
        torch.manual_seed(0)
        self._settings, self._inputs, self._folder = sizes.joint, inputs, folder
        self.model = self._fresh(sizes)
        self._averaged = self._fresh(sizes).eval().requires_grad_(False)
        self.auxiliary = Auxiliary(sizes.model.encoder_width)
        self.average = Average(self.model, sizes.joint.average)
        named = [*self.model.named_parameters(), *self.auxiliary.named_parameters()]
        self.optimizer = MuonAdamW(named, is_matrix, _RATES)
        if sizes.joint.compiles:
            self._compile()
        self.clock, self.step = clock, 0
        self._objective = Objective(
            self.model, self.auxiliary, inputs.core, inputs.source, inputs.words
        )
        self._journal = Journal(folder / "model.jsonl")
        self._restore()

    def _fresh(self, sizes: Sizes) -> MiniModel:
        channels = sizes.autoencoder.latent_channels
        model = MiniModel(sizes.model, channels, self._inputs.clip_pieces, self._inputs.t5_pieces)
        mix_norms(model)
        return model

    @property
    def checkpoint(self) -> Path:
        """Where the run is saved."""
        return self._folder / "model.pt"

    def _restore(self) -> None:
        state = load_checkpoint(self.checkpoint)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.auxiliary.load_state_dict(state["auxiliary"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.clock.spent_s = state["step"], state["spent_s"]

    def save(self) -> None:
        """Write the checkpoint."""
        state = {
            "model": self.model.state_dict(),
            "auxiliary": self.auxiliary.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "spent_s": self.clock.spent_s,
        }
        save_checkpoint(self.checkpoint, state)

    def averaged(self) -> MiniModel:
        """The model with averaged weights, for use and for export."""
        self._averaged.load_state_dict(self.average.weights)
        return self._averaged

    def run(self, probe: Probe | None = None) -> None:
        """Train until the budget is spent; ``probe`` looks at samples now and then."""
        saved_at = probed_at = self.clock.spent_s
        sums: dict[str, list[float]] = {}
        self.clock.start()
        while not self.clock.is_over:
            for name, value in self.train_step().items():
                sums.setdefault(name, []).append(value)
            self.clock.tick()
            if self.step % self._settings.report_every == 0:
                self._report(sums)
            if self.clock.spent_s - saved_at >= self._settings.save_every_s:
                saved_at = self.clock.spent_s
                self.save()
                self.clock.start()
            if probe and self.clock.spent_s - probed_at >= self._settings.probe_every_s:
                probed_at = self.clock.spent_s
                self._probe(probe)
                self.clock.start()
        self.save()
        if probe:
            self._probe(probe)

    def _report(self, sums: dict[str, list[float]]) -> None:
        means = {name: float(np.mean(values)) for name, values in sums.items()}
        sums.clear()
        self._journal.write("step", step=self.step, minutes=self.clock.spent_s / 60, **means)

    def _probe(self, probe: Probe) -> None:
        minutes = self.clock.spent_s / 60
        sheet = self._folder / f"probe-{round(minutes):04d}.png"
        found = probe.look(self.averaged(), sheet, self._settings.grids[:2])
        self._journal.write("probe", step=self.step, minutes=minutes, **found)

    def train_step(self) -> dict[str, float]:
        """One update; returns the parts of the loss. Depends on nothing but state and step."""
        rng = np.random.default_rng((2, self.step))
        torch.manual_seed(self.step)
        fraction = self.clock.fraction
        grid = grid_at(rng, fraction, self._settings)
        now = schedule_at(rng, self.step, fraction, self._settings)
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


def train(place: Workplace, sizes: Sizes, clock: TrainingClock) -> JointTraining:
    """Train, or go on with what was begun, until the clock's budget is spent."""
    inputs, icons = prepare(place, sizes)
    training = JointTraining(sizes, inputs, place.model, clock)
    count = min(16, len(icons.held_out_rows))
    training.run(Probe(icons, inputs.core, sizes.model.encoder_side, count))
    return training


def main() -> None:
    """Command line."""
    options = cli.parse(__doc__, minutes=180.0)
    train(options.place, options.sizes, options.clock)


if __name__ == "__main__":
    main()
