"""What happens between loading a transformer and its first request: compile, compare, keep.

Every size of a plan is run once as it was and once compiled, on made-up tokens; what crashes or
differs is taken back, and the transformer runs as it did before. What is equal beforehand need not
be equal later for all sizes, but one graph serves them all. Knows no pictures and no settings.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from redux_pipelines.compilation.cache import CodeFolder, machine_facts
from redux_pipelines.compilation.compiled import Backend, Compiled, compiled_graphs, gist
from redux_pipelines.compilation.cuda_graphs import Capture, CudaCapture, GraphedStep
from redux_pipelines.conditioning.tokens import Conditioning, Tokens
from redux_pipelines.contract.types import CompileMode, CompilePlan, CompileReport
from redux_pipelines.denoising.denoiser import Denoiser, PreparedDenoiser
from redux_pipelines.denoising.engine import EngineDenoiser
from redux_pipelines.denoising.quality import TIERS
from redux_pipelines.sampling import Grid, Schedule

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative error of a whole step up to which compiled code is taken for right.

Far above what rounding in another order gives (2e-7 in float32), far below what a wrong operator
gives. For a network as deep as FLUX.1 in half precision it is an estimate.
"""

_SCHEDULE = Schedule((1.0, 0.5, 0.0))
_REDUX_TOKENS = 729
_FOLDED_TOKENS = 512


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
) -> CompileReport:
    """Carry out ``plan`` for ``grids`` and batches of so many images.

    ``backend`` is torch.compile's; ``capture`` makes CUDA graphs, by default the GPU's driver does.
    Raises ``ValueError`` for another denoiser than the engine's.
    """
    if not isinstance(denoiser, EngineDenoiser):
        raise ValueError(
            f"the backend {denoiser.name!r} cannot be compiled: use the backend 'engine'"
        )
    work = _WarmUp(denoiser, plan, grids, batches)
    if denoiser.flux.blocks_ready is not None and (plan.mode == "full" or plan.cuda_graphs):
        work.failures.append(
            "not compiled as a whole, no CUDA graphs: blocks are streamed from host memory "
            "(--memory offload), which only --compile blocks goes with"
        )
        return work.report()
    with torch.inference_mode():
        if plan.mode != "off":
            work.compile(backend)
        if plan.cuda_graphs and not work.failures:
            work.capture(capture)
    return work.report()


@dataclass
class _WarmUp:
    denoiser: EngineDenoiser
    plan: CompilePlan
    grids: Sequence[Grid]
    batches: Sequence[int]
    seconds: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    graphs: int = 0
    reused: int = 0

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

    def capture(self, capture: Capture | None) -> None:
        """Replay a step of the first size, and keep doing so only if it gives the same bits."""
        grid = self.grids[0]
        img = _noise(self.denoiser, grid, 1)
        with self._timed(f"graph {grid.rows}x{grid.columns}"):
            try:
                step = self.denoiser.flux
                expected = _predict(self.denoiser, grid, img)
                graphed = GraphedStep(step, capture or CudaCapture(), self.plan.cuda_graphs)
                self.denoiser.graphed = graphed
                replayed = [_predict(self.denoiser, grid, img) for _ in range(2)]
                reason = None if graphed.captured else "no step could be captured"
                if not all(torch.equal(expected, each) for each in replayed):
                    reason = "a replayed step gives other numbers"
            except Exception as error:
                logger.warning("cannot use CUDA graphs", exc_info=error)
                reason = f"{type(error).__name__}: {gist(error)}"
        if reason is not None:
            self.denoiser.graphed = None
            self.failures.append(f"no CUDA graphs: {reason}")

    def report(self) -> CompileReport:
        """What became of the plan."""
        return CompileReport(
            mode=compiled_mode(self.denoiser),
            cuda_graphs=self.plan.cuda_graphs if self.denoiser.graphed else 0,
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
        for batch in self.batches:
            for grid in self.grids:
                with self._timed(f"{grid.rows}x{grid.columns} tokens, batch {batch}"):
                    self._compare(compiled, grid, batch)
                if not compiled.is_active:
                    return

    def _compare(self, compiled: Compiled, grid: Grid, batch: int) -> None:
        img = _noise(self.denoiser, grid, batch)
        try:
            with compiled.paused():
                expected = _predict(self.denoiser, grid, img)
        except torch.OutOfMemoryError:
            logger.warning("%s x %d does not fit into memory, compiled or not", grid, batch)
            return
        for what, predict in self._compiled_steps():
            error = _relative_error(predict(self.denoiser, grid, img), expected)
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


def _predict(denoiser: EngineDenoiser, grid: Grid, img: Tensor) -> Tensor:
    """A whole step, as an exact request's."""
    return _prepared(denoiser, grid, len(img)).predict(img, 1)


def _predict_cut(denoiser: EngineDenoiser, grid: Grid, img: Tensor) -> Tensor:
    """The same in two parts, as a step cache computes it: nothing is reused in a run's first."""
    return _prepared(denoiser, grid, len(img)).start(TIERS["balanced"]).predict(img, 1)


def _prepared(denoiser: EngineDenoiser, grid: Grid, batch: int) -> PreparedDenoiser:
    """Made-up tokens, folded text and a picture, of ``batch`` requests without a prompt."""
    width, pooled = denoiser.flux.params.context_in_dim, denoiser.flux.params.vec_in_dim
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(_REDUX_TOKENS, width, generator=generator)
    text = Tokens(torch.zeros(1, width), copies=_FOLDED_TOKENS)
    conditioning = Conditioning(text, (Tokens(picture),), torch.zeros(pooled), guidance=3.5)
    prepared = denoiser.prepare(conditioning, _SCHEDULE, grid)
    return denoiser.join([prepared] * batch)


def _noise(denoiser: EngineDenoiser, grid: Grid, batch: int) -> Tensor:
    weight = denoiser.flux.txt_in.weight
    shape = (batch, grid.tokens, denoiser.flux.params.in_channels)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
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
