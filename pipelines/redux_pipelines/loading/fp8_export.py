"""A checkpoint with its transformer in fp8, written beside the original, file by file.

Never holds more than one of the new files. The new folder appears whole or not at all: it is
written under another name beside it and renamed at the end. Weights of other parts are hard
links where the disk allows it; small files are copies. Knows no network.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from redux_pipelines.errors import WeightsError
from redux_pipelines.fp8.linear import E4M3
from redux_pipelines.fp8.weights import CONFIG_KEY, FORMAT, METHOD, SCALE, WEIGHT, Quantized, is_fp8
from redux_pipelines.loading.flux_weights import WEIGHTS, Shards, check_names, fp8_layers
from redux_pipelines.network.flux import FluxParams
from redux_weights.layout import BASE_FILES, find_missing_base

SHARD_BYTES = 5 * 10**9
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_CPU = torch.device("cpu")
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")
_SPARE_BYTES = 2**20  # headers, indices, folders

Report = Callable[[int, int], None]
"""Called with bytes of the transformer that are done, and that there will be."""

Plan = Sequence[Mapping[str, Tensor]]
"""The new files' tensors by name, on torch's ``meta`` device: dtypes and shapes alone."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What was written: bytes of the transformer, before and after, and parts linked or copied."""

    before_bytes: int
    after_bytes: int
    linked: int
    copied: int


def quantize_checkpoint(
    base: Path, out: Path, *, report: Report, shard_bytes: int = SHARD_BYTES
) -> Summary:
    """Write ``base``, a folder in diffusers' layout, to the new folder ``out`` in fp8.

    Raises ``WeightsError`` for a base that is incomplete or in fp8 already, an ``out`` that is
    there, and a disk without room; nothing is left of ``out`` then, nor after any other exception.
    """
    config = _read_config(base)
    params = FluxParams.of(config)
    _check_out(out)
    shards = Shards(base / "transformer")
    check_names(params, shards)
    tensors = Quantized(shards, fp8_layers(params), _CPU)
    plan = _plan(shards, tensors, shard_bytes)
    others = _other_files(base)
    _check_space(out.parent, plan, others)
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    with _whole_or_nothing(part, out):
        _write_transformer(part / "transformer", config, plan, tensors, report)
        links = [_link(file, part / name) for name, file in others.items()]
    before = sum(_announced(key, shards).nbytes for key in shards)
    return Summary(before, _total(plan), sum(links), len(links) - sum(links))


def _read_config(base: Path) -> dict[str, Any]:
    problems = find_missing_base(base)
    if problems:
        raise WeightsError("the checkpoint is incomplete:\n" + "\n".join(problems))
    config: dict[str, Any] = json.loads((base / "transformer" / "config.json").read_text())
    if is_fp8(config):
        raise WeightsError(f"{base} is in fp8 already: give the checkpoint it was made from")
    return config


def _check_out(out: Path) -> None:
    if os.path.lexists(out):
        raise WeightsError(f"{out} exists: choose another --out, or remove it first")
    if not out.parent.is_dir():
        raise WeightsError(f"{out.parent} is not a folder: create it, or choose another --out")


def _plan(shards: Shards, tensors: Quantized, shard_bytes: int) -> Plan:
    """What to write. A scale is in the file of its weight, after it."""
    files: list[dict[str, Tensor]] = [{}]
    for key in tensors:
        planned = _planned(key, shards, tensors)
        is_full = sum(each.nbytes for each in files[-1].values()) + planned.nbytes > shard_bytes
        if is_full and files[-1] and not key.endswith(SCALE):
            files.append({})
        files[-1][key] = planned
    return files


def _planned(key: str, shards: Shards, tensors: Quantized) -> Tensor:
    if key.endswith(SCALE):
        weight = _announced(key.removesuffix(SCALE) + WEIGHT, shards)
        return torch.empty(len(weight), 1, device="meta")
    found = _announced(key, shards)
    return found.to(E4M3) if tensors.is_quantized(key) else found


def _announced(key: str, shards: Shards) -> Tensor:
    """A tensor of the original as its file announces it, which is not read."""
    dtype, shape = shards.describe(key)
    if dtype not in _FLOATS:
        raise WeightsError(
            f"the transformer's {key} is {dtype}, and only {', '.join(_FLOATS)} are quantised: "
            "give the original weights"
        )
    return torch.empty(shape, dtype=_FLOATS[dtype], device="meta")


def _total(plan: Plan) -> int:
    return sum(each.nbytes for planned in plan for each in planned.values())


def _other_files(base: Path) -> dict[Path, Path]:
    """What is taken over: relative names, and the files behind them (in a hub's cache, blobs)."""
    found = {}
    for pattern in (*BASE_FILES, *_LICENCES):
        for path in sorted(base.glob(pattern)):
            name = path.relative_to(base)
            if name.parts[0] != "transformer" and path.is_file():
                found[name] = path.resolve()
    return found


def _check_space(folder: Path, plan: Plan, others: dict[Path, Path]) -> None:
    disk = folder.stat().st_dev
    copied = sum(file.stat().st_size for file in others.values() if file.stat().st_dev != disk)
    wanted, free = _total(plan) + copied + _SPARE_BYTES, shutil.disk_usage(folder).free
    if free < wanted:
        raise WeightsError(
            f"{folder} has {free / 1e9:.1f} GB free, and {wanted / 1e9:.1f} GB are needed: make "
            "room, or choose another --out"
        )


@contextlib.contextmanager
def _whole_or_nothing(part: Path, out: Path) -> Iterator[None]:
    """A new folder ``part`` that becomes ``out`` in the end, and goes if there is an exception."""
    try:
        part.mkdir()
        yield
        part.rename(out)
    except OSError as error:
        raise WeightsError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_transformer(
    folder: Path,
    config: dict[str, Any],
    plan: Plan,
    tensors: Quantized,
    report: Report,
) -> None:
    folder.mkdir()
    about = _about(plan)
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(about)}
    done, total, weight_map = 0, _total(plan), {}
    for number, planned in enumerate(plan, start=1):
        name = _file_name(number, len(plan))
        made = _empty(planned)
        for key, tensor in made.items():
            tensor.copy_(tensors[key])
            done += tensor.nbytes
            report(done, total)
            weight_map[key] = name
        _save(made, folder / name, metadata)
        del made, tensor  # before the next file's are there
    if len(plan) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n")
    text = json.dumps({**config, CONFIG_KEY: about}, indent=2)
    (folder / "config.json").write_text(text + "\n")


def _empty(planned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Memory for a file's tensors, in one piece.

    In pieces it would lie scattered between what quantising needs and frees, and be held twice.
    """
    sizes = [-(-each.nbytes // 8) * 8 for each in planned.values()]
    parts = torch.split(torch.empty(sum(sizes), dtype=torch.uint8), sizes)
    return {
        key: part[: each.nbytes].view(each.dtype).view(each.shape)
        for (key, each), part in zip(planned.items(), parts, strict=True)
    }


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a new file, which is on the disk when this returns.

    safetensors leaves it to its owner alone; who may read its folder may read it too.
    """
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _file_name(number: int, count: int) -> str:
    if count == 1:
        return WEIGHTS
    stem, suffix = WEIGHTS.rsplit(".", 1)
    return f"{stem}-{number:05d}-of-{count:05d}.{suffix}"


def _about(plan: Plan) -> dict[str, Any]:
    """What ``config.json`` and the files' headers say of how they were made."""
    shapes = {key: tuple(each.shape) for planned in plan for key, each in planned.items()}
    scaled = {key.removesuffix(SCALE) for key in shapes if key.endswith(SCALE)}
    matrices = {key.removesuffix(WEIGHT) for key, shape in shapes.items() if shape[1:] > (1,)}
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "weights": "float8_e4m3fn, with one float32 scale per output row in NAME.weight_scale",
        "not_quantized": sorted({re.sub(r"\.\d+\.", ".*.", name) for name in matrices - scaled}),
    }


def _link(file: Path, to: Path) -> bool:
    """Make ``to`` the same file if it holds weights, else a copy; whether it is the same.

    Small files may be edited by hand, which must not change the original.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    if to.suffix == ".safetensors":
        with contextlib.suppress(OSError):  # another disk, or one without hard links
            os.link(file, to)
            return True
    shutil.copyfile(file, to)
    return False
