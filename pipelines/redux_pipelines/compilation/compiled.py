"""torch.compile over the transformer: one graph for all sizes and prompts.

What differs between requests reaches a compiled function as the extent of a tensor, never as a
number, for each number would cost a graph of its own. So biases of keys travel in a small tensor,
and attention is one operator that the compiler does not look into. Compiled functions stand in
front of the network's own and can be taken away again. Knows no requests and no files.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from redux_pipelines.attention.groups import Groups, Implementation, KeyGroup
from redux_pipelines.contract.types import CompileMode
from redux_pipelines.network.flux import BlockContext, Flux

logger = logging.getLogger(__name__)

Backend = str | Callable[..., Any]

_known: dict[str, Implementation] = {}


@torch.library.custom_op("redux_pipelines::attend", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, groups: Tensor, name: str) -> Tensor:
    """Attention ``(B, Q, heads, D)`` by the implementation ``name``.

    ``q (B, heads, Q, D)``, ``k`` and ``v (B, heads, S, D)``; ``groups`` as ``_table`` writes them.
    """
    out = _known[name].attend(q, k, v, _groups(groups))
    return out.transpose(1, 2).contiguous()


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, groups: Tensor, name: str) -> Tensor:
    batch, heads, rows, width = q.shape
    return q.new_empty((batch, rows, heads, width))


@torch.library.custom_op("redux_pipelines::attend_into", mutates_args=("into",))
def _attend_into(q: Tensor, k: Tensor, v: Tensor, groups: Tensor, name: str, into: Tensor) -> None:
    """As ``_attend``, its result written to ``into (B, heads, Q, D)``."""
    _known[name].attend(q, k, v, _groups(groups), into)


@_attend_into.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, groups: Tensor, name: str, into: Tensor) -> None:
    pass


def _table(groups: Groups) -> Tensor:
    """``(G, 2)`` rows and biases, in host memory; at least two, for one would be a special case."""
    filled = [*groups, *[KeyGroup(0, 0.0)] * (2 - len(groups))]
    return torch.tensor([(each.rows, each.bias) for each in filled], dtype=torch.float64)


def _groups(table: Tensor) -> Groups:
    return tuple(KeyGroup(int(rows), bias) for rows, bias in table.tolist() if rows)


@dataclass(frozen=True, slots=True)
class _Opaque:
    """An ``Attention`` whose groups came with it, as a tensor."""

    name: str
    table: Tensor

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, groups: Groups, into: Tensor | None = None
    ) -> Tensor:
        """Attend through an operator that a compiler does not look into."""
        if into is not None:
            _attend_into(q, k, v, self.table, self.name, into)
            return into
        out: Tensor = _attend(q, k, v, self.table, self.name)
        return out.transpose(1, 2)


def traceable(context: BlockContext, attention: Implementation) -> BlockContext:
    """``context`` in the form that compiled functions take; the network as it is takes it too.

    Raises ``ValueError`` for another attention with the name of one that was used before.
    """
    if _known.setdefault(attention.name, attention).attend is not attention.attend:
        raise ValueError(f"another attention is called {attention.name!r}: give it its own name")
    return replace(context, attention=_Opaque(attention.name, _table(context.groups)))


class Compiled:
    """The compiled functions of a network, in front of its own until ``remove``.

    ``blocks`` compiles each kind of block, once for all blocks of that kind; ``full`` the whole
    step, and the kinds of blocks as well for steps that a step cache cuts in two: the parts of a
    cut step compiled whole would take as long again as the step. A function is compiled when first
    called. One that cannot be compiled for what it is given leaves the network as it was, for good;
    ``failure`` and the log say why.
    """

    def __init__(self, flux: Flux, mode: CompileMode, backend: Backend = "inductor") -> None:
        self.mode = mode
        self.failure: str | None = None
        self._is_paused = False
        self._replaced: list[tuple[nn.Module, str]] = []
        compiled: dict[Any, Any] = {}
        for module, name in _methods(flux, mode):
            plain = getattr(type(module), name)
            if plain not in compiled:
                compiled[plain] = torch.compile(plain, fullgraph=True, backend=backend)
            setattr(module, name, self._entry(module, plain, compiled[plain]))
            self._replaced.append((module, name))

    @property
    def is_active(self) -> bool:
        """Whether compiled functions are called."""
        return bool(self._replaced) and not self._is_paused

    def remove(self, failure: str | None = None) -> None:
        """Leave the network as it was before. ``failure`` says why, if something went wrong."""
        self.failure = self.failure or failure
        for module, name in self._replaced:
            delattr(module, name)
        self._replaced.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The network as it was before, within this context."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def _entry(self, module: nn.Module, plain: Any, compiled: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            # a block while the whole step is traced, which is to see what is in it
            if torch.compiler.is_compiling() or not self.is_active:
                return plain(module, *arguments)
            if isinstance(module, Flux):
                arguments = tuple(map(_as_inference, arguments))
            _mark(arguments)
            try:
                return compiled(module, *arguments)
            except compiler_errors() as error:
                reason = gist(error)
                logger.warning("not compiled any more, which is slower: %s", reason)
                self.remove(reason)
                return plain(module, *arguments)

        return call


def _methods(flux: Flux, mode: CompileMode) -> Iterator[tuple[nn.Module, str]]:
    """Modules, and the names of their methods, that ``mode`` compiles."""
    if mode == "full":
        yield flux, "forward"
    if mode != "off":
        singles = list(flux.single_blocks)
        yield from ((block, "forward") for block in (*flux.double_blocks, *singles[:-1]))
        yield from ((block, "forward_img") for block in singles[-1:])


def _as_inference(argument: Any) -> Any:
    """In inference mode, a tensor made in it: the first noise of a request is not, later steps are.

    The compiler takes the two for different kinds, each with a graph of its own.
    """
    is_odd = isinstance(argument, Tensor) and not argument.is_inference()
    return argument.clone() if is_odd and torch.is_inference_mode_enabled() else argument


def _mark(arguments: tuple[Any, ...]) -> None:
    """Say which axes of a call's tensors may have any extent: rows, and images if several."""
    *streams, mod, context = arguments
    _mark_axis(context.txt, context.txt.dim() - 2)
    for each in (*context.rope, context.attention.table):
        _mark_axis(each, 0)
    if mod.dim() == 4:
        _mark_axis(mod, 1)
    for each in (*_tensors(streams), context.txt):
        if each.dim() == 3:
            _mark_axis(each, 0)
            _mark_axis(each, 1)


def _mark_axis(tensor: Tensor, axis: int) -> None:
    if tensor.shape[axis] > 1:  # an extent of 1 always is a graph of its own
        torch._dynamo.mark_dynamic(tensor, axis)


def _tensors(nested: Any) -> Iterator[Tensor]:
    for each in nested:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, tuple):
            yield from _tensors(each)


def compiler_errors() -> tuple[type[Exception], ...]:
    """What a compiled function raises before it has computed anything.

    torch's compiler is imported where something is compiled: it takes as long as torch itself.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return TorchDynamoException, FailOnRecompileLimitHit


def compiled_graphs() -> int:
    """How many graphs this process has compiled so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def gist(error: BaseException) -> str:
    """The first paragraph of what an exception says, in one line."""
    text = str(error).strip() or type(error).__name__
    return " ".join(text.partition("\n\n")[0].split())[:300]
