"""How a function becomes an operator: known to torch's dispatcher and compiler, and cheap to call.

``torch.library.custom_op`` would do, but puts three Python functions of its own before every call,
and a step of FLUX.1 makes hundreds. Where nobody could want to know of a call, it goes to the
function straight. Knows no operator.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.utils import _pytree

P = ParamSpec("P")
R = TypeVar("R")

_libraries: dict[str, Any] = {}  # an operator is gone with its library


def operator(
    name: str, *, mutates_args: tuple[str, ...]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a function as ``torch.ops.NAMESPACE.NAME``, for inference, on every device.

    The schema comes from its annotations, as ``torch.library.custom_op`` has it. It must return new
    tensors, and write to none of its arguments but ``mutates_args``. A gradient through it raises
    ``RuntimeError`` where it is called, and a compiler needs ``register_fake``.

    What is given back goes through the dispatcher, ``overload_of`` it, wherever that has something
    to do: outside of inference mode, for a compiler, and within a dispatch mode, which sees calls.

    Args:
        name: ``NAMESPACE::NAME``.
        mutates_args: the names of the tensors it writes to.
    """
    namespace, _, own = name.partition("::")

    def register(function: Callable[P, R]) -> Callable[P, R]:
        library: Any = _libraries.setdefault(namespace, _library(namespace))
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        library.define(own + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(own, function, "CompositeExplicitAutograd")
        overload = getattr(getattr(torch.ops, namespace), own).default
        outside = _outside_inference_mode(name, overload, _positions(function, mutates_args))
        library.impl(own, outside, "Autograd", with_keyset=True)
        return _calling(function, overload)

    return register


def _calling(function: Callable[P, R], overload: Any) -> Callable[P, R]:
    """``function`` itself where the dispatcher would only find it: that takes six times as long."""
    is_compiling, is_inference = torch.compiler.is_compiling, torch.is_inference_mode_enabled
    count_modes = torch._C._len_torch_dispatch_stack

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if is_compiling() or not is_inference() or count_modes():
            return cast(R, overload(*args, **kwargs))
        return function(*args, **kwargs)

    cast(Any, call).overload = overload
    return call


def overload_of(registered: Callable[..., Any]) -> Any:
    """The ``torch._ops.OpOverload`` of what ``operator`` gave back."""
    return cast(Any, registered).overload


def _library(namespace: str) -> Any:
    return torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]


def register_fake(
    registered: Callable[..., Any],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what an operator gives for tensors without memory: to compilers, and on ``meta``."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        overload = overload_of(registered)
        torch.library.register_fake(overload, function, lib=_libraries[overload.namespace])
        return function

    return register


def _positions(function: Callable[..., Any], names: tuple[str, ...]) -> tuple[int, ...]:
    parameters = tuple(inspect.signature(function).parameters)
    return tuple(map(parameters.index, names))


def _outside_inference_mode(
    name: str, overload: Any, mutated: tuple[int, ...]
) -> Callable[..., Any]:
    """What runs first outside of inference mode, where nothing may be lost in silence.

    No gradient, and not that a tensor has changed, which others may have kept for theirs.
    """

    def refuse_or_run(keys: Any, *args: Any) -> Any:
        leaves = _pytree.tree_leaves(args)
        if torch.is_grad_enabled() and any(
            isinstance(each, Tensor) and each.requires_grad for each in leaves
        ):
            raise RuntimeError(
                f"{name} computes no gradients, and one of its tensors requires one: call it "
                "within torch.inference_mode() or torch.no_grad()"
            )
        result = overload.redispatch(keys & torch._C._after_autograd_keyset, *args)
        for index in mutated:
            if index < len(args) and args[index] is not None and not args[index].is_inference():
                torch.autograd.graph.increment_version(args[index])
        return result

    return refuse_or_run
