"""The transformer backend ``engine``: without what need not be computed; exact, unless told not to.

Equal text tokens are one row; text is embedded once a request; modulations and RoPE tables are
kept for the next request of the same kind. Knows no images and no sampling loop.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from redux_kernels import checks
from redux_pipelines.attention.groups import Implementation
from redux_pipelines.compilation.compiled import Compiled, traceable
from redux_pipelines.compilation.cuda_graphs import GraphedStep, Step
from redux_pipelines.conditioning.tokens import Conditioning, fold_tokens
from redux_pipelines.contract.types import QUALITIES
from redux_pipelines.denoising.denoiser import PreparedDenoiser, Run
from redux_pipelines.denoising.quality import Tier
from redux_pipelines.denoising.step_cache import CachedRun, Measure
from redux_pipelines.lru import LRU, digest, tensor_bytes
from redux_pipelines.network.flux import BlockContext, Flux
from redux_pipelines.network.layers import Rope, rope_table
from redux_pipelines.network.modulation import Modulation
from redux_pipelines.network.operators import Operators
from redux_pipelines.sampling import Grid, Schedule

MODULATION_CACHE_BYTES = 256 * 2**20
"""Four schedules of FLUX.1 at 28 steps in bfloat16."""

ROPE_CACHE_BYTES = 64 * 2**20
"""Six grids of 1536 × 1536 pixels or more of smaller ones."""


class EngineDenoiser:
    """FLUX's transformer with tables of modulations and rotations kept between requests."""

    name = "engine"
    qualities = QUALITIES

    def __init__(self, flux: Flux, attention: Implementation, operators: Operators) -> None:
        self.compiled: Compiled | None = None
        self.graphed: GraphedStep | None = None
        self.least_txt_rows = 2  # for a compiler an extent of 1 is another kind
        self._flux = flux
        self._attention = attention
        self._operators = operators
        self._modulations: LRU[tuple[tuple[float, ...], float, bytes], Tensor] = LRU(
            MODULATION_CACHE_BYTES, tensor_bytes
        )
        self._ropes: LRU[tuple[Grid, int], Rope] = LRU(
            ROPE_CACHE_BYTES, lambda rope: tensor_bytes(*rope)
        )

    @property
    def attention(self) -> str:
        """The name of the implementation chosen."""
        return self._attention.name

    @property
    def flux(self) -> Flux:
        """The network."""
        return self._flux

    @property
    def caches(self) -> Mapping[str, LRU[Any, Any]]:
        """What is kept between requests: ``modulations`` and ``rotations``."""
        return {"modulations": self._modulations, "rotations": self._ropes}

    @property
    def has_fp8(self) -> bool:
        """Whether any of its layers multiplies in fp8."""
        return self._flux.has_fp8

    def prepare(
        self, conditioning: Conditioning, schedule: Schedule, grid: Grid
    ) -> "PreparedEngine":
        """Embed the text rows, and find or make the tables for ``schedule`` and ``grid``."""
        rows = fold_tokens(
            conditioning, grid.tokens, self._attention.row_multiple, self.least_txt_rows
        )
        txt_in = self._flux.txt_in
        txt = txt_in(rows.values.to(txt_in.weight.device, txt_in.weight.dtype))
        context = BlockContext(
            txt=txt,
            rope=self._rope(grid, len(txt)),
            groups=rows.groups,
            attention=self._attention,
            operators=self._operators,
        )
        if self.compiled is not None and self.compiled.is_active:
            context = traceable(context, self._attention)
        step = self.graphed or self._flux
        modulation = self._modulation(conditioning, schedule)
        return PreparedEngine(self._flux, step, txt, modulation, context)

    def join(self, prepared: Sequence[PreparedDenoiser]) -> "PreparedEngine":
        """Stack text and modulations; of one image it is that image's own, as they are.

        A batch has a text and a modulation per image even where they are equal, so that compiled
        code and CUDA graphs know one form of a batch.
        """
        parts = [each for each in prepared if isinstance(each, PreparedEngine)]
        first = parts[0]
        if len(parts) == 1:
            return first
        if any(each.context.groups != first.context.groups for each in parts):
            raise ValueError(
                "requests whose keys are laid out differently cannot share a batch: denoise those "
                "with an encoded prompt apart from those without"
            )
        txt = torch.stack([each.txt for each in parts])
        modulation = _PerImage(tuple(each.modulation for each in parts))
        return replace(
            first, txt=txt, modulation=modulation, context=replace(first.context, txt=txt)
        )

    def _rope(self, grid: Grid, txt_rows: int) -> Rope:
        weight = self._flux.txt_in.weight
        kind = torch.promote_types(weight.dtype, torch.float32)

        def make() -> Rope:
            table = self._operators.rotation(rope_table(txt_rows, grid, self._flux.params.axes_dim))
            return Rope(*(each.to(weight.device, kind) for each in table))

        return self._ropes.get((grid, txt_rows), make)

    def _modulation(self, conditioning: Conditioning, schedule: Schedule) -> Tensor:
        weight = self._flux.txt_in.weight
        vec = conditioning.vec.to(weight.device, weight.dtype)
        has_guidance = self._flux.params.guidance_embed
        guidance = conditioning.guidance if has_guidance else 0.0
        key = (schedule.sigmas, guidance, digest(vec))
        times, scale_offset = _times(schedule, guidance, weight), self._operators.scale_offset
        return self._modulations.get(
            key, lambda: self._flux.modulation.table(*times, vec, scale_offset=scale_offset)
        )


@dataclass(frozen=True, slots=True)
class _PerImage:
    """The modulations of a batch: a table ``(N, rows, H)`` for each of its B images.

    A step's are put together when it comes: all steps of FLUX.1 would be 59 MB an image once more.
    """

    tables: tuple[Modulation, ...]

    def __len__(self) -> int:
        return len(self.tables[0])

    def __getitem__(self, step: int) -> Tensor:
        """``(rows, B, 1, H)``."""
        return torch.stack([table[step] for table in self.tables], dim=1).unsqueeze(2)


@dataclass(frozen=True, slots=True)
class PreparedEngine:
    """A request, or a batch of them, ready for its steps; ``step`` is what computes one.

    ``measure`` is what a step cache asks.
    """

    reused: ClassVar[int] = 0
    flux: Flux
    step: Step
    txt: Tensor
    modulation: Modulation
    context: BlockContext
    measure: Measure | None = None
    _passed: set[Hashable] = field(default_factory=set, init=False, repr=False, compare=False)

    def predict(self, img: Tensor, step: int) -> Tensor:
        """Velocity of ``img (B, L, C)`` at ``step``."""
        with checks.once_for(self._passed, img):
            return self.step(img, self.txt, self.modulation[step], self.context)

    def start(self, tier: Tier) -> Run:
        """Itself, or with a cache of steps where ``tier`` has one."""
        if tier.cache is None:
            return self
        return CachedRun(
            self.flux, self.txt, self.modulation, self.context, tier.cache, measure=self.measure
        )


def _times(schedule: Schedule, guidance: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Times ``(N,)`` and guidance ``(1,)``, times 1000 and rounded as diffusers does.

    Its scheduler's times are float32; the model's dtype is what they are divided and multiplied in.
    """
    times = torch.tensor(schedule.sigmas[:-1], device=like.device) * 1000
    scale = torch.tensor([guidance], device=like.device)
    return times.to(like.dtype) / 1000 * 1000, scale.to(like.dtype) * 1000
