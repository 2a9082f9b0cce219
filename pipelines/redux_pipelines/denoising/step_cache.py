"""The step cache: blocks after the first that are not run while their input hardly changes.

What the first block adds to the image rows is compared with what it added at the last computed
step. Where the two are alike, so is what all further blocks add, and that is taken from the line
through the last two computed steps instead of being computed. The ideas are those of first-block
caches (ParaAttention; cache-dit's DBCache with F1B0) and of TaylorSeer at order 1, applied to our
own network. Knows no tiers and no sampling loop.

The decision is taken on the device, and one number comes to the host for it, at steps that may
reuse at all. On a GPU the host then waits for the first block and cannot queue the others before;
for a moment the device has nothing to do: about the time of one launch, as long as the host queues
kernels faster than they run (never timed: no GPU was there). A step therefore cannot be captured as
one graph, but as two: the first block, and all others. Three tensors ``(B, L, H)`` are kept between
steps: for FLUX.1 at 1024 × 1024 in bfloat16 72 MiB an image.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from redux_kernels import checks
from redux_pipelines.denoising.quality import CachePolicy
from redux_pipelines.network.flux import BlockContext, Flux
from redux_pipelines.network.layers import within_range_
from redux_pipelines.network.modulation import Modulation

Measure = Callable[[Tensor, Tensor], Tensor]
"""``relative_change``, or what is that for rows of which we hold a share."""


@dataclass(frozen=True, slots=True)
class _Computed:
    """What blocks added to the image rows ``(B, L, H)`` at a computed step: the first, the rest.

    ``slope`` is by how much the latter grew per step since the computed step before, if any was.
    """

    step: int
    change: Tensor
    rest: Tensor
    slope: Tensor | None


class StepCache:
    """What the last computed step found, and whether the next one may reuse it.

    Belongs to one run over ``steps`` steps of one batch of images, which decide together: the image
    that changed most counts.
    """

    def __init__(self, policy: CachePolicy, steps: int, measure: Measure | None = None) -> None:
        self._policy = policy
        self._measure = measure or relative_change
        self._steps = steps
        self._last: _Computed | None = None
        self._hits = 0
        self.reused = 0

    def recall(self, change: Tensor, step: int) -> Tensor | None:
        """What the further blocks will add, ``(B, L, H)``, if an estimate will do; else None.

        ``change (B, L, H)`` is what the first block added now. After None the step is to be
        computed and kept.
        """
        last = self._last
        if last is None or not self._policy.may_reuse(step, self._steps, self._hits):
            return None
        if not float(self._measure(change, last.change)) < self._policy.threshold:  # NaN is not
            return None
        self._hits += 1
        self.reused += 1
        if last.slope is None:
            return last.rest
        return torch.add(last.rest, last.slope, alpha=step - last.step)

    def keep(self, change: Tensor, rest: Tensor, step: int) -> None:
        """Remember a computed step: what its first block added, and what the others did."""
        last = self._last
        slope = None if last is None else within_range_(rest - last.rest).div_(step - last.step)
        self._last, self._hits = _Computed(step, change, rest, slope), 0


def relative_change(now: Tensor, former: Tensor) -> Tensor:
    """The L1 distance of ``(B, L, H)`` to ``former`` over the norm of that, largest of the batch.

    Summed in float32; stays on the device.
    """
    distance, norm = (
        each.abs().mean(dim=(1, 2), dtype=torch.float32) for each in (now - former, former)
    )
    return (distance / norm).max()


class CachedRun:
    """A ``Run`` of ``flux`` over a schedule that computes only what its step cache asks for.

    ``modulation`` is that of the schedule's steps.
    """

    def __init__(
        self,
        flux: Flux,
        txt: Tensor,
        modulation: Modulation,
        context: BlockContext,
        policy: CachePolicy,
        *,
        measure: Measure | None = None,
    ) -> None:
        self._flux = flux
        self._txt = txt
        self._modulation = modulation
        self._context = context
        self._cache = StepCache(policy, len(modulation), measure)
        self._passed: set[Hashable] = set()

    @property
    def reused(self) -> int:
        """Steps so far at which only the first block was run."""
        return self._cache.reused

    def predict(self, img: Tensor, step: int) -> Tensor:
        """Velocity of ``img (B, L, C)`` at ``step``; steps come in their order, each once."""
        with checks.once_for(self._passed, img):  # the first one is never reused: it runs all
            return self._predict(img, step)

    def _predict(self, img: Tensor, step: int) -> Tensor:
        flux, mod, rows = self._flux, self._modulation[step], img.shape[1]
        x = flux.embed(img, self._txt)
        before = x[:, -rows:].clone()
        x = flux.run(x, mod, self._context, 0, 1)
        first = x[:, -rows:].clone()  # blocks may change their input
        change = first - before
        rest = self._cache.recall(change, step)
        if rest is None:
            out = flux.run(x, mod, self._context, 1, flux.num_blocks)
            self._cache.keep(change, within_range_(out - first), step)
        else:
            out = within_range_(first + rest)
        return flux.project_out(out, mod, self._context)
