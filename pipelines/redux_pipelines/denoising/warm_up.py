"""What happens between loading a transformer and its first request: compile, compare, keep.

Every size of a plan is run as it was and compiled, on made-up tokens, and again on others: what
gives its first result once more differs then. What crashes or differs is taken back, and the
transformer runs as it did before. What is equal beforehand need not be equal later for all sizes,
but one graph serves them all. Knows no pictures and no settings.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from redux_pipelines.compilation.cache import CodeFolder, machine_facts
from redux_pipelines.compilation.compiled import Backend, Compiled, compiled_graphs, gist
from redux_pipelines.compilation.cuda_graphs import Capture, CudaCapture, GraphedStep
from redux_pipelines.conditioning.tokens import Conditioning, Tokens
from redux_pipelines.contract.types import CompileMode, CompilePlan, CompileReport
from redux_pipelines.denoising.denoiser import Denoiser
from redux_pipelines.denoising.engine import EngineDenoiser, PreparedEngine
from redux_pipelines.denoising.quality import TIERS
from redux_pipelines.memory.plan import GraphLimits
from redux_pipelines.network.layers import Rope
from redux_pipelines.sampling import Grid, Schedule

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative error of a whole step up to which compiled code is taken for right.

Far above what rounding in another order gives (2e-7 in float32), far below what a wrong operator
gives. For a network as deep as FLUX.1 in half precision it is an estimate.
"""

_SCHEDULE = Schedule((1.0, 0.5, 0.0))
_REDUX_TOKENS = 729


class _Trial(NamedTuple):
    """A step of made-up inputs: the noise and tokens drawn, its number, its text's copies.

    ``turned``: positions are others, too.
    """

    seed: int
    step: int
    copies: int
    turned: bool


_TRIALS = (_Trial(1, 1, 512, False), _Trial(2, 0, 300, True))
"""Two that have no input in common."""


def compiled_mode(denoiser: Denoiser) -> CompileMode:
    """What of it runs compiled now."""
    compiled = denoiser.compiled if isinstance(denoiser, EngineDenoiser) else None
    return compiled.mode if compiled is not None and compiled.is_active else "off"


def warm_up(
    denoiser: Denoiser,
    plan: CompilePlan,
    grids: Sequence[Grid],
    batches: Sequence[int],
    *,
    backend: Backend = "inductor",
    capture: Capture | None = None,
    limits: GraphLimits | None = None,
    least: Grid | None = None,
) -> CompileReport:
    """Carry out ``plan`` for ``grids`` and batches of so many images.

    ``backend`` is torch.compile's; ``capture`` makes CUDA graphs, by default the GPU's driver does.
    ``limits``: the graphs that the memory plan has room for, None where it was not asked. ``least``
    is the smallest grid of all: compiled code is compared there too, and graphs are tried there
    where none of ``grids`` is small enough for them. Raises ``ValueError`` for another denoiser
    than the engine's.
    """
    if not isinstance(denoiser, EngineDenoiser):
        raise ValueError(
            f"the backend {denoiser.name!r} cannot be compiled: use the backend 'engine'"
        )
    work = _WarmUp(denoiser, plan, grids, batches, least)
    asks_for_graphs = plan.cuda_graphs not in (0, "auto")
    if denoiser.flux.blocks_ready is not None and (plan.mode == "full" or asks_for_graphs):
        work.failures.append(
            "not compiled as a whole, no CUDA graphs: blocks are streamed from host memory "
            "(--memory offload), which only --compile blocks goes with"
        )
        return work.report()
    with torch.inference_mode():
        if plan.mode != "off":
            work.compile(backend)
        if denoiser.flux.blocks_ready is None:
            work.capture(capture, limits)
    return work.report()


@dataclass
class _WarmUp:
    denoiser: EngineDenoiser
    plan: CompilePlan
    grids: Sequence[Grid]
    batches: Sequence[int]
    least: Grid | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    graphs: int = 0
    reused: int = 0
    cuda_graphs: int = 0

    def compile(self, backend: Backend) -> None:
        """Compile and compare at every size, with what was kept from the last start.

        If that fails, what was kept may be damaged: it is tried once more without.
        """
        kept = self._code_folder()
        was_there = kept is not None and kept.path.exists()
        failure = self._try(kept, backend)
        if failure is not None and was_there:
            logger.warning("compiling anew, without what was kept")
            torch._dynamo.reset()
            failure = self._try(kept, backend)
        if failure is not None:
            self.failures.append(f"not compiled: {failure}")

    def _try(self, kept: CodeFolder | None, backend: Backend) -> str | None:
        """Compile and compare; why that failed, if it did, and nothing is kept then."""
        in_use = kept if kept is not None and kept.use() else None
        graphs, hits = compiled_graphs(), _found()
        compiled = self.denoiser.compiled = Compiled(self.denoiser.flux, self.plan.mode, backend)
        try:
            self._compare_all(compiled)
        except Exception as error:  # whatever it is, the network can run without
            logger.warning("cannot compile", exc_info=error)
            compiled.remove(f"{type(error).__name__}: {gist(error)}")
        finally:
            _end_compiler_processes()
        self.graphs = compiled_graphs() - graphs
        self.reused = _found() - hits
        if compiled.failure is not None and in_use is not None:
            in_use.discard()
        return compiled.failure

    def capture(self, capture: Capture | None, limits: GraphLimits | None) -> None:
        """Let steps be replayed as CUDA graphs, if those tried here give the bits of the steps."""
        limits = self._graph_limits(limits)
        if limits is None:
            return
        reason: str | None = "the memory plan has no room for them"
        if limits.shapes:
            reason = self._try_graphs(capture, limits)
        if reason is None:
            self.cuda_graphs = limits.shapes
        elif limits.shapes or self.plan.cuda_graphs != "auto":
            self.failures.append(f"no CUDA graphs: {reason}")
        wanted = self.plan.cuda_graphs
        if wanted != "auto" and 0 < self.cuda_graphs < wanted:
            self.failures.append(
                f"CUDA graphs of {limits.shapes} shapes, not of {wanted}: the memory plan has no "
                "room for more"
            )

    def _graph_limits(self, limits: GraphLimits | None) -> GraphLimits | None:
        wanted = self.plan.cuda_graphs
        if wanted == "auto" or wanted == 0:
            return limits if wanted else None
        if limits is None:
            return GraphLimits(wanted, sys.maxsize)
        return replace(limits, shapes=min(limits.shapes, wanted))

    def _try_graphs(self, capture: Capture | None, limits: GraphLimits) -> str | None:
        """Why steps are not replayed, or None: they are from now on."""
        flux = self.denoiser.flux
        try:
            own = capture or CudaCapture(flux.txt_in.weight.device)
            graphed = GraphedStep(flux, own, limits.shapes, max_rows=limits.rows)
            for grid in self._graph_grids(graphed):
                with self._timed(f"graph {grid.rows}x{grid.columns}"):
                    if reason := self._replay(graphed, grid):
                        graphed.clear()
                        return reason
        except Exception as error:
            logger.warning("cannot use CUDA graphs", exc_info=error)
            return f"{type(error).__name__}: {gist(error)}"
        graphed.waits = True  # from now on what comes may never come again
        self.denoiser.graphed = graphed
        return None

    def _graph_grids(self, graphed: GraphedStep) -> list[Grid]:
        """Those small enough, as many as are kept; else the smallest that a request may have."""
        small = [
            grid
            for grid in self.grids
            if graphed.takes(
                _noise(self.denoiser, grid, 1), _prepared(self.denoiser, grid, 1).context.txt
            )
        ]
        return small[: graphed.max_graphs] or ([self.least] if self.least else [])

    def _replay(self, graphed: GraphedStep, grid: Grid) -> str | None:
        """Whether replays give the bits of steps: of other noise, tokens, and another step.

        What is captured proves itself before (``GraphedStep``); here it is used as requests do.
        """
        trials = [trial._replace(copies=_TRIALS[0].copies, turned=False) for trial in _TRIALS]
        for trial in (*trials, trials[0]):
            prepared = _prepared(self.denoiser, grid, 1, trial)
            img = _noise(self.denoiser, grid, 1, trial)
            expected = prepared.predict(img, trial.step)
            got = replace(prepared, step=graphed).predict(img, trial.step)
            if not torch.equal(got, expected):
                return "a replayed step gives other numbers"
        if graphed.failure is not None:
            return graphed.failure
        return None if graphed.captured else "no step could be captured"

    def report(self) -> CompileReport:
        """What became of the plan."""
        return CompileReport(
            mode=compiled_mode(self.denoiser),
            cuda_graphs=self.cuda_graphs,
            failures=tuple(self.failures),
            seconds=self.seconds,
            graphs=self.graphs,
            reused=self.reused,
        )

    def _code_folder(self) -> CodeFolder | None:
        if self.plan.cache_dir is None:
            return None
        weight = self.denoiser.flux.txt_in.weight
        params = {name: str(value) for name, value in asdict(self.denoiser.flux.params).items()}
        facts = {"mode": self.plan.mode, "dtype": str(weight.dtype), "version": self.plan.version}
        facts["fp8"] = str(self.denoiser.flux.has_fp8)
        return CodeFolder(self.plan.cache_dir, {**machine_facts(weight.device), **params, **facts})

    def _compare_all(self, compiled: Compiled) -> None:
        least = () if self.least is None or self.least in self.grids else (self.least,)
        for batch in self.batches:
            for grid in (*self.grids, *least):
                with self._timed(f"{grid.rows}x{grid.columns} tokens, batch {batch}"):
                    for trial in _TRIALS:
                        self._compare(compiled, grid, batch, trial)
                if not compiled.is_active:
                    return

    def _compare(self, compiled: Compiled, grid: Grid, batch: int, trial: _Trial) -> None:
        img = _noise(self.denoiser, grid, batch, trial)
        try:
            with compiled.paused():
                expected = _predict(self.denoiser, grid, img, trial)
        except torch.OutOfMemoryError:
            logger.warning("%s x %d does not fit into memory, compiled or not", grid, batch)
            return
        for what, predict in self._compiled_steps():
            error = _relative_error(predict(self.denoiser, grid, img, trial), expected)
            if not error <= TOLERANCE[img.dtype]:  # NaN is not
                compiled.remove(
                    f"{what} of {grid.rows}x{grid.columns} tokens is off by {error:.1e}, "
                    f"at most {TOLERANCE[img.dtype]:.0e} is allowed"
                )
                return

    def _compiled_steps(self) -> Iterator[tuple[str, Callable[..., Tensor]]]:
        """What runs through other graphs: a whole step, and one that a step cache cuts in two."""
        yield "a compiled step", _predict
        if self.plan.mode == "full":
            yield "a compiled step with a step cache", _predict_cut

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - started
        logger.info("warm-up: %s took %.1f s", stage, self.seconds[stage])


def _predict(denoiser: EngineDenoiser, grid: Grid, img: Tensor, trial: _Trial) -> Tensor:
    """A whole step, as an exact request's."""
    return _prepared(denoiser, grid, len(img), trial).predict(img, trial.step)


def _predict_cut(denoiser: EngineDenoiser, grid: Grid, img: Tensor, trial: _Trial) -> Tensor:
    """The same in two parts, as a step cache computes it: nothing is reused in a run's first."""
    prepared = _prepared(denoiser, grid, len(img), trial)
    return prepared.start(TIERS["balanced"]).predict(img, trial.step)


def _prepared(
    denoiser: EngineDenoiser, grid: Grid, batch: int, trial: _Trial = _TRIALS[0]
) -> PreparedEngine:
    """Made-up tokens, folded text and a picture, of ``batch`` requests without a prompt."""
    width, pooled = denoiser.flux.params.context_in_dim, denoiser.flux.params.vec_in_dim
    generator = torch.Generator().manual_seed(trial.seed)
    picture = torch.randn(_REDUX_TOKENS, width, generator=generator)
    vec = torch.randn(pooled, generator=generator)
    text = Tokens(torch.randn(1, width, generator=generator), copies=trial.copies)
    conditioning = Conditioning(text, (Tokens(picture),), vec, guidance=3.5)
    prepared = denoiser.prepare(conditioning, _SCHEDULE, grid)
    if trial.turned:
        rope = Rope(*(each.flip(0) for each in prepared.context.rope))
        prepared = replace(prepared, context=replace(prepared.context, rope=rope))
    return denoiser.join([prepared] * batch)


def _noise(denoiser: EngineDenoiser, grid: Grid, batch: int, trial: _Trial = _TRIALS[0]) -> Tensor:
    weight = denoiser.flux.txt_in.weight
    shape = (batch, grid.tokens, denoiser.flux.params.in_channels)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(trial.seed))
    return noise.to(weight.device, weight.dtype)


def _relative_error(given: Tensor, expected: Tensor) -> float:
    difference, norm = (given.double() - expected.double()).norm(), expected.double().norm()
    return float(difference / norm)


def _found() -> int:
    """Graphs whose compiled code was kept from before, so far."""
    return counters["inductor"]["fxgraph_cache_hit"]


def _end_compiler_processes() -> None:
    """Inductor compiles in processes of its own, which would stay as long as we do."""
    from torch._inductor.async_compile import shutdown_compile_workers

    shutdown_compile_workers()
