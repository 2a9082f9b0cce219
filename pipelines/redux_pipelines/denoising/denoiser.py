"""The transformer behind a small interface: prepare requests, join them, start a run, predict.

``prepare`` receives all that stays the same over the steps, so that a faster backend can embed the
text once, compute every modulation of the schedule in one go, keep RoPE tables per grid and fold
equal text tokens. ``join`` puts images of several requests into one batch. A run holds what one
step leaves to the next. ``denoising.engine`` saves all this; ``denoising.diffusers_backend`` runs
diffusers' own network, saves nothing, and is what the engine is measured against. Knows no images
and no sampling loop.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from redux_pipelines.conditioning.tokens import Conditioning
from redux_pipelines.contract.types import Quality
from redux_pipelines.denoising.quality import Tier
from redux_pipelines.lru import LRU
from redux_pipelines.sampling import Grid, Schedule


class Run(Protocol):
    """One pass over all steps of a schedule, of one batch of images.

    It is begun for that batch alone, and whoever lets go of it frees what it holds.
    """

    @property
    def reused(self) -> int:
        """Steps so far that reused a part of an earlier one."""
        ...

    def predict(self, img: Tensor, step: int) -> Tensor:
        """Velocity of ``img (B, L, C)`` at ``step``, same shape and dtype.

        Steps come in their order, each once.
        """
        ...


class PreparedDenoiser(Run, Protocol):
    """A transformer made ready for a schedule, a grid, and one conditioning or one per image.

    It is itself the run that computes every step: such a run keeps nothing from step to step.
    """

    def start(self, tier: Tier) -> Run:
        """Begin a run. ``tier`` is one of those that the denoiser's ``qualities`` name."""
        ...


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

    def join(self, prepared: Sequence[PreparedDenoiser]) -> PreparedDenoiser:
        """One for a batch whose image *i* is that of ``prepared[i]``, which may be there twice.

        All are this denoiser's own, of one schedule and one grid. Raises ``ValueError`` where
        their keys are not laid out alike.
        """
        ...
