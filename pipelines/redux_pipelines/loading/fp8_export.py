"""A checkpoint with its transformer in fp8, written beside the original, tensor by tensor.

Never holds more than one tensor. The new folder appears whole or not at all: it is written under
another name beside its place and renamed at the end. Weights of other parts are hard links where
the disk allows it; small files are copies. Knows no network.
"""

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from redux_pipelines.errors import WeightsError
from redux_pipelines.fp8.weights import CONFIG_KEY, FORMAT, METHOD, SCALE, WEIGHT, Quantized, is_fp8
from redux_pipelines.loading.flux_weights import WEIGHTS, Shards, check_names, fp8_layers
from redux_pipelines.network.flux import FluxParams
from redux_weights.layout import BASE_FILES, find_missing_base

# DOC A safetensors file written tensor by tensor, with all sizes known before.
# DOC
# DOC ``safetensors.torch.save_file`` wants all tensors in memory. The format is 8 bytes with the header's
# DOC length, a JSON header, and the tensors without gaps
# DOC (https://github.com/huggingface/safetensors#format). Wide elements come first, so that each tensor
# DOC lies at a multiple of its element's size. Knows no checkpoints.

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to come: its name, its dtype in safetensors' words, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return _ITEM_BYTES[self.dtype] * math.prod(self.shape)


class ShardWriter:
    """One file. ``entries`` may be written in any order, and all must be; use it in a ``with``."""

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
        self._file = path.open("xb")
        self._places: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        for entry in sorted(entries, key=lambda each: -_ITEM_BYTES[each.dtype]):
            self._places[entry.name] = end
            offsets = [end, end := end + entry.size_bytes]
            header[entry.name] = {
                "dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets
            }  # fmt: skip
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._start = 8 + len(text)

    def write(self, entry: Entry, tensor: Tensor) -> None:
        """Put a tensor where the header says it is."""
        if (tensor.dtype, tuple(tensor.shape)) != (_DTYPES[entry.dtype], entry.shape):
            raise ValueError(
                f"{entry.name} is {tensor.dtype} {tuple(tensor.shape)}, but the header says "
                f"{entry.dtype} {entry.shape}"
            )
        self._file.seek(self._start + self._places.pop(entry.name))
        flat = tensor.detach().cpu().contiguous().view(-1)
        self._file.write(flat.view(torch.uint8).numpy().data)

    def __enter__(self) -> "ShardWriter":
        """The writer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file, safely on the disk unless there was an exception."""
        with self._file:
            if kind is not None:
                return
            if self._places:
                raise ValueError(f"not written: {', '.join(self._places)}")
            self._file.flush()
            os.fsync(self._file.fileno())


SHARD_BYTES = 5 * 10**9
_FLOATS = ("F64", "F32", "F16", "BF16")
_CPU = torch.device("cpu")
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")
_SPARE_BYTES = 2**20  # headers, indices, folders
Report = Callable[[int, int], None]
"""Called with bytes of the transformer that are written, and that there will be."""


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
    _check_place(out)
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
    before = sum(_size(*shards.describe(key)) for key in shards)
    return Summary(before, _total(plan), sum(links), len(links) - sum(links))


def _read_config(base: Path) -> dict[str, Any]:
    problems = find_missing_base(base)
    if problems:
        raise WeightsError("the checkpoint is incomplete:\n" + "\n".join(problems))
    config: dict[str, Any] = json.loads((base / "transformer" / "config.json").read_text())
    if is_fp8(config):
        raise WeightsError(f"{base} is in fp8 already: give the checkpoint it was made from")
    return config


def _check_place(out: Path) -> None:
    if os.path.lexists(out):
        raise WeightsError(f"{out} exists: choose another --out, or remove it first")
    if not out.parent.is_dir():
        raise WeightsError(f"{out.parent} is not a folder: create it, or choose another --out")


def _plan(shards: Shards, tensors: Quantized, shard_bytes: int) -> list[list[Entry]]:
    """The new files' tensors. A scale is in the file of its weight, after it."""
    files: list[list[Entry]] = [[]]
    for key in tensors:
        entry = _entry(key, shards, tensors)
        is_full = sum(each.size_bytes for each in files[-1]) + entry.size_bytes > shard_bytes
        if is_full and files[-1] and not key.endswith(SCALE):
            files.append([])
        files[-1].append(entry)
    return files


def _entry(key: str, shards: Shards, tensors: Quantized) -> Entry:
    if key.endswith(SCALE):
        _, shape = shards.describe(key.removesuffix(SCALE) + WEIGHT)
        return Entry(key, "F32", (shape[0], 1))
    dtype, shape = shards.describe(key)
    if dtype not in _FLOATS:
        raise WeightsError(
            f"the transformer's {key} is {dtype}, and only {', '.join(_FLOATS)} are quantised: "
            "give the original weights"
        )
    return Entry(key, "F8_E4M3" if tensors.is_quantized(key) else dtype, shape)


def _total(plan: Sequence[Sequence[Entry]]) -> int:
    return sum(entry.size_bytes for entries in plan for entry in entries)


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return Entry("", dtype, shape).size_bytes


def _other_files(base: Path) -> dict[Path, Path]:
    """What is taken over: relative names, and the files behind them (in a hub's cache, blobs)."""
    found = {}
    for pattern in (*BASE_FILES, *_LICENCES):
        for path in sorted(base.glob(pattern)):
            name = path.relative_to(base)
            if name.parts[0] != "transformer" and path.is_file():
                found[name] = path.resolve()
    return found


def _check_space(folder: Path, plan: Sequence[Sequence[Entry]], others: dict[Path, Path]) -> None:
    place = folder.stat().st_dev
    copied = sum(file.stat().st_size for file in others.values() if file.stat().st_dev != place)
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
    plan: Sequence[Sequence[Entry]],
    tensors: Quantized,
    report: Report,
) -> None:
    folder.mkdir()
    about = _about(plan)
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(about)}
    done, total, weight_map = 0, _total(plan), {}
    for number, entries in enumerate(plan, start=1):
        name = _file_name(number, len(plan))
        with ShardWriter(folder / name, entries, metadata) as writer:
            for entry in entries:
                writer.write(entry, tensors[entry.name])
                done += entry.size_bytes
                report(done, total)
                weight_map[entry.name] = name
    if len(plan) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n")
    text = json.dumps({**config, CONFIG_KEY: about}, indent=2)
    (folder / "config.json").write_text(text + "\n")


def _file_name(number: int, count: int) -> str:
    if count == 1:
        return WEIGHTS
    stem, suffix = WEIGHTS.rsplit(".", 1)
    return f"{stem}-{number:05d}-of-{count:05d}.{suffix}"


def _about(plan: Sequence[Sequence[Entry]]) -> dict[str, Any]:
    """What ``config.json`` and the files' headers say of how they were made."""
    entries = [entry for entries in plan for entry in entries]
    scaled = {each.name.removesuffix(SCALE) for each in entries if each.name.endswith(SCALE)}
    matrices = {each.name.removesuffix(WEIGHT) for each in entries if each.shape[1:] > (1,)}
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "weights": "float8_e4m3fn, with one float32 scale per output row in NAME.weight_scale",
        "not_quantized": sorted({re.sub(r"\.\d+\.", ".*.", name) for name in matrices - scaled}),
    }


def _link(file: Path, place: Path) -> bool:
    """Make ``place`` the same file if it holds weights, else a copy; whether it is the same.

    Small files may be edited by hand, which must not change the original.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.suffix == ".safetensors":
        with contextlib.suppress(OSError):  # another disk, or one without hard links
            os.link(file, place)
            return True
    shutil.copyfile(file, place)
    return False
