"""From diffusers' files of a FLUX transformer to ours, one tensor at a time.

The map says which of diffusers' tensors make up each of our parameters; nothing may be left over
and nothing may be missing. Every tensor is read, converted and copied into its parameter before the
next is read: there is never a second copy of the weights. Knows no requests.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from redux_pipelines.errors import WeightsError
from redux_pipelines.fp8.linear import E4M3, TRANSPOSED, Fp8Linear
from redux_pipelines.fp8.weights import SCALE
from redux_pipelines.memory.host import HostMemory, aligned
from redux_pipelines.network.flux import Flux, FluxParams

WEIGHTS = "diffusion_pytorch_model.safetensors"
_NAMED_AT_MOST = 5
_MODULATION = "modulation.layers."
_FP8_LAYERS = ("qkv", "proj", "mlp_in", "mlp_out", "linear1", "linear2")


class Shards(Mapping[str, Tensor]):
    """The tensors of a folder, each read from its file when it is asked for.

    ``folder`` holds one safetensors file, or several and their index.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / f"{WEIGHTS}.index.json"
        names = [WEIGHTS]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files: list[Any] = [safe_open(folder / name, framework="pt") for name in names]
        self._files = {key: file for file in files for key in file.keys()}  # noqa: SIM118

    def __getitem__(self, key: str) -> Tensor:
        """Read one tensor into memory of its own."""
        tensor: Tensor = self._files[key].get_tensor(key)
        return tensor

    def describe(self, key: str) -> tuple[str, tuple[int, ...]]:
        """Dtype, in safetensors' words, and shape of a tensor, which is not read."""
        found = self._files[key].get_slice(key)
        return found.get_dtype(), tuple(found.get_shape())

    def __iter__(self) -> Iterator[str]:
        """Names, file by file."""
        return iter(self._files)

    def __len__(self) -> int:
        """Tensors in all files."""
        return len(self._files)


def load_flux(
    params: FluxParams,
    tensors: Mapping[str, Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
    evict_modulation: bool = False,
    streamed_blocks: Collection[int] = (),
) -> Flux:
    """The network on ``device``, with diffusers' ``tensors``.

    Layers of blocks whose weights come with scales (see ``fp8.weights``) are built in fp8.
    ``evict_modulation`` puts the modulation layers into host memory from the start, and
    ``streamed_blocks`` (indices, double blocks first) these blocks. Raises ``WeightsError`` that
    names tensors which are missing, left over or of another shape.
    """
    with torch.device("meta"):
        flux = Flux(params)
        _use_fp8(flux, tensors)
    sources = key_map(flux)
    _check_keys(tensors, [key for keys in sources.values() for key in keys])
    evicted = {name for name in sources if evict_modulation and name.startswith(_MODULATION)}
    sizes = (dtype.itemsize * flux.get_parameter(name).numel() for name in evicted)
    memory = HostMemory(sum(map(aligned, sizes)), pinned=device.type == "cuda")
    for name, parameter in list(flux.named_parameters()):
        is_transposed = name.rpartition(".")[2] in TRANSPOSED  # and has a dtype of its own
        kind = parameter.dtype if is_transposed else dtype
        if name in evicted:
            piece = memory.take(kind.itemsize * parameter.numel())
            room = piece.tensor(kind, parameter.shape)
        else:  # blocks that stream are packed later, into page-locked memory
            is_streamed = _block_index(name, params) in streamed_blocks
            where = torch.device("cpu") if is_streamed else device
            layout = parameter.shape, parameter.stride()
            room = torch.empty_strided(*layout, dtype=kind, device=where)
        _fill(room.t() if is_transposed else room, sources[name], tensors)
        _set(flux, name, room)
    return flux.eval()


def _block_index(name: str, params: FluxParams) -> int | None:
    """Of the block that a parameter belongs to; double blocks count first."""
    kind, _, rest = name.partition(".")
    if kind not in ("double_blocks", "single_blocks"):
        return None
    return int(rest.partition(".")[0]) + (params.depth if kind == "single_blocks" else 0)


def check_names(params: FluxParams, tensors: Iterable[str]) -> None:
    """Raise ``WeightsError`` that names tensors which are missing or left over."""
    with torch.device("meta"):
        sources = key_map(Flux(params))
    _check_keys(tensors, [key for keys in sources.values() for key in keys])


def key_map(flux: Flux) -> dict[str, tuple[str, ...]]:
    """For each of our parameters, diffusers' tensors that it consists of, one below the other."""
    named = dict(_modules(flux.params))
    sources = {}
    for name, _ in flux.named_parameters():
        module, _, kind = name.rpartition(".")
        if kind == "qk_norm":
            sources[name] = tuple(f"{each}.weight" for each in named[name])
        else:
            their_kind = TRANSPOSED.get(kind, kind)
            sources[name] = tuple(f"{each}.{their_kind}" for each in named[module])
    return sources


def fp8_layers(params: FluxParams) -> frozenset[str]:
    """Diffusers' names of the layers that are in fp8 where a network is."""
    return frozenset(
        theirs for ours, parts in _modules(params) if _may_be_fp8(ours) for theirs in parts
    )


def _may_be_fp8(name: str) -> bool:
    return name.rpartition(".")[2] in _FP8_LAYERS


def _use_fp8(flux: Flux, tensors: Mapping[str, Tensor]) -> None:
    """Replace the layers of which ``tensors`` has scales."""
    for ours, theirs in _modules(flux.params):
        if _may_be_fp8(ours) and any(f"{each}{SCALE}" in tensors for each in theirs):
            linear = flux.get_submodule(ours)
            assert isinstance(linear, torch.nn.Linear)
            flux.set_submodule(ours, Fp8Linear(linear.in_features, linear.out_features))


Named = Iterator[tuple[str, tuple[str, ...]]]


def _modules(params: FluxParams) -> Named:
    """Our modules, and the modules of diffusers that each one joins."""
    yield "img_in", ("x_embedder",)
    yield "txt_in", ("context_embedder",)
    yield "final", ("proj_out",)
    embedders = [("time_in", "timestep"), ("vector_in", "text")]
    if params.guidance_embed:
        embedders.append(("guidance_in", "guidance"))
    for ours, theirs in embedders:
        for layer, number in (("in_layer", 1), ("out_layer", 2)):
            their_name = f"time_text_embed.{theirs}_embedder.linear_{number}"
            yield f"modulation.{ours}.{layer}", (their_name,)
    modulation = []
    for index in range(params.depth):
        yield from _double_block(index)
        names = ("norm1", "norm1_context")
        modulation += [f"transformer_blocks.{index}.{name}.linear" for name in names]
    for index in range(params.depth_single_blocks):
        yield from _single_block(index)
        modulation.append(f"single_transformer_blocks.{index}.norm.linear")
    for number, name in enumerate([*modulation, "norm_out.linear"]):
        yield f"modulation.layers.{number}", (name,)


def _double_block(index: int) -> Named:
    theirs, ours = f"transformer_blocks.{index}", f"double_blocks.{index}"
    img = ("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out.0")
    txt = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", "to_add_out")
    for stream, names, mlp in (("img", img, "ff"), ("txt", txt, "ff_context")):
        *qkv, norm_q, norm_k, out = (f"{theirs}.attn.{name}" for name in names)
        yield f"{ours}.{stream}.qkv", tuple(qkv)
        yield f"{ours}.{stream}.qk_norm", (norm_q, norm_k)
        yield f"{ours}.{stream}.proj", (out,)
        yield f"{ours}.{stream}.mlp_in", (f"{theirs}.{mlp}.net.0.proj",)
        yield f"{ours}.{stream}.mlp_out", (f"{theirs}.{mlp}.net.2",)


def _single_block(index: int) -> Named:
    theirs, ours = f"single_transformer_blocks.{index}", f"single_blocks.{index}"
    qkv = (f"{theirs}.attn.to_{letter}" for letter in "qkv")
    yield f"{ours}.linear1", (*qkv, f"{theirs}.proj_mlp")
    yield f"{ours}.linear2", (f"{theirs}.proj_out",)
    yield f"{ours}.qk_norm", (f"{theirs}.attn.norm_q", f"{theirs}.attn.norm_k")


def _check_keys(given: Iterable[str], expected: Iterable[str]) -> None:
    given, expected = set(given), set(expected)
    problems = {"lacks": expected - given, "has unknown": given - expected}
    parts = [f"{what} {_some(names)}" for what, names in problems.items() if names]
    if parts:
        raise WeightsError(f"the transformer {' and '.join(parts)}")


def _some(names: set[str]) -> str:
    shown = sorted(names)[:_NAMED_AT_MOST]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _fill(room: Tensor, keys: tuple[str, ...], tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors into ``room``, one below the other."""
    for key in keys:
        room = room[_copy(tensors[key], room, key) :]
    if len(room):
        raise WeightsError(f"the transformer's {keys[-1]} lacks {len(room)} rows")


def _copy(tensor: Tensor, room: Tensor, key: str) -> int:
    """Copy ``tensor`` to the first rows of ``room``; how many these are."""
    part = room[: len(tensor)]
    if part.shape != tensor.shape:
        raise WeightsError(
            f"the transformer's {key} is {tuple(tensor.shape)}, but {tuple(room.shape)} is left "
            "for it and what follows"
        )
    if part.dtype == E4M3 != tensor.dtype:
        raise WeightsError(f"the transformer's {key} has a scale, but it is {tensor.dtype}")
    part.copy_(tensor)
    return len(tensor)


def _set(flux: Flux, name: str, value: Tensor) -> None:
    module, _, attribute = name.rpartition(".")
    setattr(flux.get_submodule(module), attribute, torch.nn.Parameter(value, requires_grad=False))
