"""Sizes of everything that is trained: the real mini model, and a toy for tests.

Frozen values only; knows no torch.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class AutoencoderSizes:
    """The f8 core's ``channels`` from the outside in, and its training batches.

    ``crops`` are side in pixels and number of the crops of a batch, early, late and last (in turns
    with late): group normalisation sees whole pictures, so training must end with whole ones.
    """

    channels: tuple[int, ...] = (16, 32, 64, 128)
    groups: int = 8
    latent_channels: int = 16
    crops: tuple[tuple[int, int], ...] = ((64, 16), (128, 8), (256, 2))

    @property
    def factor(self) -> int:
        """Core pixels per latent pixel along each side."""
        return int(2 ** (len(self.channels) - 1))


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Widths and depths of the transformer and its encoders.

    ``encoder_side`` and ``encoder_patch`` are pixels; ``text_tokens`` is the longest prompt.
    """

    heads: int = 4
    head_width: int = 64
    rope_axes: tuple[int, int, int] = (8, 28, 28)
    double_blocks: int = 3
    single_blocks: int = 6
    text_width: int = 192
    text_heads: int = 3
    pooled_width: int = 128
    pooled_heads: int = 2
    text_tokens: int = 16
    encoder_width: int = 192
    encoder_heads: int = 3
    encoder_layers: int = 3
    encoder_side: int = 128
    encoder_patch: int = 16

    @property
    def width(self) -> int:
        """Width of the transformer."""
        return self.heads * self.head_width

    @property
    def encoder_grid(self) -> int:
        """Redux tokens along each side of a picture."""
        return self.encoder_side // self.encoder_patch


@dataclass(frozen=True, slots=True)
class Cadence:
    """How often a run writes to its journal, in steps, and saves and looks, in seconds of training.

    ``look_every_s`` 0 never looks.
    """

    report_every: int
    save_every_s: float
    look_every_s: float = 0.0


@dataclass(frozen=True, slots=True)
class JointSettings:
    """How transformer and encoders are trained.

    ``grids`` are token sides: early square, late square, longest; ``oblongs`` are usual pairs of
    sides. ``shares`` of steps go, once there are larger grids, to early squares, late squares,
    oblongs (lying or standing) and any other shape. Fractions are of the budget: ``large_from``
    brings larger grids, ``guides_from`` model guidance; a run that begins with a finished model
    begins at ``finished_at``, when rates fall. ``text_only`` is the share of steps without a
    picture. ``alignment`` is that loss's weight at first and again when larger grids come, both
    times falling to 0 in ``alignment_steps``. ``compiles`` the blocks (for steps without it).
    """

    batch: int = 32
    grids: tuple[int, int, int] = (8, 16, 24)
    oblongs: tuple[tuple[int, int], ...] = (
        (8, 24),
        (12, 21),
        (12, 16),
        (13, 19),
        (9, 16),
        (16, 24),
    )
    shares: tuple[float, float, float, float] = (0.2, 0.3, 0.35, 0.15)
    large_from: float = 0.25
    finished_at: float = 0.6
    guides_from: float = 0.88
    constant_rate_until: float = 0.5
    text_only: float = 0.08
    alignment: float = 3.0
    alignment_steps: int = 500
    compiles: bool = True
    average: float = 0.998
    cadence: Cadence = field(default_factory=lambda: Cadence(20, 180.0, 600.0))


@dataclass(frozen=True, slots=True)
class Sizes:
    """All of a model's sizes and how it is trained."""

    autoencoder: AutoencoderSizes = field(default_factory=AutoencoderSizes)
    model: ModelSizes = field(default_factory=ModelSizes)
    joint: JointSettings = field(default_factory=JointSettings)
    held_out: int = 130


FULL = Sizes()
SMOKE = Sizes(
    autoencoder=AutoencoderSizes(
        channels=(8, 8, 16, 16), groups=4, latent_channels=4, crops=((32, 8), (32, 8), (64, 4))
    ),
    model=ModelSizes(
        heads=2,
        head_width=16,
        rope_axes=(4, 6, 6),
        double_blocks=1,
        single_blocks=1,
        text_width=32,
        text_heads=2,
        pooled_width=32,
        encoder_width=32,
        encoder_heads=2,
        encoder_layers=1,
        encoder_side=64,
    ),
    joint=JointSettings(
        batch=8,
        grids=(8, 10, 12),
        oblongs=((8, 12),),
        alignment_steps=20,
        compiles=False,
        cadence=Cadence(report_every=10, save_every_s=40, look_every_s=600),
    ),
    held_out=4,
)
"""Toy sizes for tests: the same code in seconds, with pictures of nothing."""
