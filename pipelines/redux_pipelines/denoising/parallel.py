"""The transformer on several ranks: the root's denoiser, and what the followers do for it.

The root tells every follower each call that it makes of its own share: prepare, join, start,
predict. Tensors go over the group, and only those that are needed: the conditioning once a request,
at each step a share of the image and its velocity back. Followers keep what they prepared by the
root's numbers and forget it once the root did, so a run that is given up between two steps leaves
nothing behind. Knows no files and not how processes are started.
"""

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from redux_pipelines.conditioning.tokens import Conditioning, Tokens
from redux_pipelines.contract.types import QUALITIES
from redux_pipelines.denoising.denoiser import PreparedDenoiser, Run
from redux_pipelines.denoising.quality import Tier
from redux_pipelines.denoising.sharded import ShardedEngine
from redux_pipelines.errors import DeviceError
from redux_pipelines.lru import LRU
from redux_pipelines.parallel.followers import Followers
from redux_pipelines.parallel.group import Group, GroupError
from redux_pipelines.parallel.shares import Shares
from redux_pipelines.sampling import Grid, Schedule

# --- What is told ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prepare:
    """Prepare a request. Its tokens, then its pooled text, follow over the group as one tensor.

    ``tokens`` has ``Tokens`` without their values: rows, copies and log weight of the text, then of
    each picture.
    """

    tokens: tuple[tuple[int, int, float], ...]
    guidance: float
    schedule: Schedule
    grid: Grid


@dataclass(frozen=True, slots=True)
class Join:
    """Put images of prepared requests into a batch."""

    parts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Start:
    """Begin a run."""

    prepared: int
    tier: Tier


@dataclass(frozen=True, slots=True)
class Predict:
    """Predict a velocity. The images, of ``shape`` (B, L, C) in all, follow over the group."""

    run: int
    step: int
    shape: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Told:
    """A call, the number its result is kept by, and the numbers that are needed no more."""

    call: Prepare | Join | Start | Predict
    number: int
    forgotten: tuple[int, ...]


# --- The root -------------------------------------------------------------------------------------


class _Handle:
    """A number by which followers keep something, for as long as this lives."""

    def __init__(self, number: int, forgotten: list[int]) -> None:
        self.number = number
        weakref.finalize(self, forgotten.append, number).atexit = False


@dataclass(slots=True, eq=False)
class _Root:
    group: Group
    followers: Followers
    numbers: Iterator[int] = field(default_factory=itertools.count)
    forgotten: list[int] = field(default_factory=list)

    def tell(self, call: Prepare | Join | Start | Predict) -> _Handle:
        handle = _Handle(next(self.numbers), self.forgotten)
        forgotten = tuple(self.forgotten)
        self.followers.send(Told(call, handle.number, forgotten))
        del self.forgotten[: len(forgotten)]
        return handle

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Whatever is raised within leaves the ranks out of step for good: ``DeviceError``."""
        self.followers.check()
        try:
            yield
        except DeviceError:
            raise
        except BaseException as error:
            text = str(error).strip().split("\n", 1)[0] or type(error).__name__
            reason = self.followers.lose(
                f"{text}; the ranks are out of step", is_cause=not isinstance(error, GroupError)
            )
            if not isinstance(error, Exception):
                raise
            raise DeviceError(f"an image on several devices failed: {reason}") from error


class ParallelDenoiser:
    """The engine on the ranks of a group, of which we are the root.

    Any failure of any rank while they compute, a lack of memory too, is a ``DeviceError``: the
    others wait for it in vain, so all have to begin anew.
    """

    name = "engine"
    qualities = QUALITIES

    def __init__(self, sharded: ShardedEngine, followers: Followers) -> None:
        self._sharded = sharded
        self._root = _Root(sharded.group, followers)
        followers.on_failure(sharded.group.abort)

    @property
    def attention(self) -> str:
        """The name of the implementation that each rank runs."""
        return self._sharded.engine.attention

    @property
    def caches(self) -> Mapping[str, LRU[Any, Any]]:
        """Those of our own rank."""
        return self._sharded.engine.caches

    def prepare(
        self, conditioning: Conditioning, schedule: Schedule, grid: Grid
    ) -> PreparedDenoiser:
        """As the engine does, on every rank."""
        given = (conditioning.txt, *conditioning.redux)
        tokens = tuple((len(each.values), each.copies, each.log_weight) for each in given)
        weight = self._sharded.engine.flux.txt_in.weight
        values = [each.values.flatten() for each in given] + [conditioning.vec]
        flat = torch.cat([each.to(weight.device, weight.dtype) for each in values])
        with self._root.in_step():
            handle = self._root.tell(Prepare(tokens, conditioning.guidance, schedule, grid))
            self._root.group.broadcast(flat)
        own = self._sharded.prepare(conditioning, schedule, grid)
        return _Prepared(self._root, handle, own, _Image(grid, schedule, self._root.group.ranks))

    def join(self, prepared: Sequence[PreparedDenoiser]) -> PreparedDenoiser:
        """As the engine does, on every rank."""
        parts = [each for each in prepared if isinstance(each, _Prepared)]
        own = self._sharded.join([each.own for each in parts])
        handle = self._root.tell(Join(tuple(each.handle.number for each in parts)))
        return _Prepared(self._root, handle, own, parts[0].image)


@dataclass(frozen=True, slots=True)
class _Image:
    grid: Grid
    schedule: Schedule
    ranks: int

    @property
    def shares(self) -> Shares:
        return Shares.of(self.grid.tokens, self.ranks)


@dataclass(frozen=True, slots=True)
class _ParallelRun:
    """A run of which ``own`` is our rank's; the followers know theirs by ``handle``."""

    root: _Root
    handle: _Handle
    own: Run
    image: _Image

    @property
    def reused(self) -> int:
        return self.own.reused

    def predict(self, img: Tensor, step: int) -> Tensor:
        root, shares = self.root, self.image.shares
        batch, rows, width = img.shape
        with root.in_step():
            root.tell(Predict(self.handle.number, step, (batch, rows, width)))
            own = self.own.predict(root.group.scatter(img, shares), step)
            velocity = root.group.gather(own, shares)
            assert velocity is not None
            if step + 1 == self.image.schedule.steps and img.is_cuda:
                torch.cuda.synchronize(img.device)  # what is queued may still fail
                root.followers.check()
        return velocity


@dataclass(frozen=True, slots=True)
class _Prepared(_ParallelRun):
    own: PreparedDenoiser

    def start(self, tier: Tier) -> Run:
        own = self.own.start(tier)
        handle = self.root.tell(Start(self.handle.number, tier))
        return _ParallelRun(self.root, handle, own, self.image)


# --- A follower -----------------------------------------------------------------------------------


@torch.inference_mode()
def follow(sharded: ShardedEngine, next_told: Callable[[], Told]) -> None:
    """Do what the root tells, for ever; whatever is raised has put the ranks out of step."""
    kept: dict[int, Any] = {}
    while True:
        told = next_told()
        for number in told.forgotten:
            kept.pop(number, None)
        result = _carry_out(told.call, sharded, kept)
        if result is not None:
            kept[told.number] = result
        del result


def _carry_out(
    call: Prepare | Join | Start | Predict, sharded: ShardedEngine, kept: Mapping[int, Any]
) -> Any:
    match call:
        case Prepare():
            conditioning = _received(call, sharded)
            return sharded.prepare(conditioning, call.schedule, call.grid)
        case Join():
            return sharded.join([kept[part] for part in call.parts])
        case Start():
            return kept[call.prepared].start(call.tier)
        case Predict():
            _predict(call, sharded, kept[call.run])


def _received(call: Prepare, sharded: ShardedEngine) -> Conditioning:
    """The conditioning that the root broadcasts."""
    params, dtype = sharded.engine.flux.params, sharded.engine.flux.txt_in.weight.dtype
    sizes = [rows * params.context_in_dim for rows, _, _ in call.tokens]
    flat = sharded.group.receive(sum(sizes) + params.vec_in_dim, dtype)
    *values, vec = torch.split(flat, [*sizes, params.vec_in_dim])
    txt, *redux = (
        Tokens(each.view(rows, -1), copies, log_weight)
        for each, (rows, copies, log_weight) in zip(values, call.tokens, strict=True)
    )
    return Conditioning(txt, tuple(redux), vec, call.guidance)


def _predict(call: Predict, sharded: ShardedEngine, run: Run) -> None:
    shares = Shares.of(call.shape[1], sharded.group.ranks)
    dtype = sharded.engine.flux.txt_in.weight.dtype
    own = sharded.group.receive_share(call.shape, dtype, shares)
    sharded.group.gather(run.predict(own, call.step), shares)
