"""The tiers of quality: what each one approximates, as frozen settings.

Imports no torch. Knows no network; ``denoising.step_cache`` carries a policy out.

Thresholds were chosen on the embedded model ``mini`` alone, by PSNR and SSIM against ``exact``
(``python -m training.evaluate --variant quality=balanced``). They are not validated on FLUX.1-dev.
On ``mini`` the number of reuses in a row costs most: the worst of three icons at 1024 × 1024 lay at
35 dB with two, at 44 dB with one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from redux_pipelines.contract.types import Quality


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """When a step may reuse what the last computed one found.

    ``threshold``: the relative change of the first block's output up to which it may. The first
    ``warm_up`` steps and the ``final`` last ones are always computed, and so is the one that comes
    after ``max_hits`` reuses in a row.
    """

    threshold: float
    warm_up: int
    max_hits: int
    final: int = 1

    def may_reuse(self, step: int, steps: int, hits: int) -> bool:
        """Whether step ``step`` of ``steps``, after ``hits`` reuses in a row, need not be computed.

        The first step never may: there is nothing yet to reuse.
        """
        return max(self.warm_up, 1) <= step < steps - self.final and hits < self.max_hits


@dataclass(frozen=True, slots=True)
class Tier:
    """What a quality allows. ``cache`` is None where every step is computed."""

    cache: CachePolicy | None = None


TIERS: Final[Mapping[Quality, Tier]] = MappingProxyType(
    {
        "exact": Tier(),
        "balanced": Tier(CachePolicy(threshold=0.12, warm_up=4, max_hits=1)),
        "fast": Tier(CachePolicy(threshold=0.20, warm_up=4, max_hits=3)),
    }
)
