"""Which files a FLUX.1 base and a Redux checkpoint consist of, and whether they are whole.

diffusers' folder layout. Standard library only: reads headers and sizes, never a tensor.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BASE_FILES = (
    "model_index.json",
    "scheduler/*.json",
    "tokenizer/*",
    "tokenizer_2/*",
    "text_encoder/*.json",
    "text_encoder/*.safetensors",
    "text_encoder_2/*.json",
    "text_encoder_2/*.safetensors",
    "transformer/*.json",
    "transformer/*.safetensors",
    "vae/*.json",
    "vae/*.safetensors",
)
"""Patterns of what to fetch of a base repository: not its single-file checkpoints (24 GB)."""

REDUX_FILES = (
    "model_index.json",
    "feature_extractor/*.json",
    "image_encoder/*.json",
    "image_encoder/*.safetensors",
    "image_embedder/*.json",
    "image_embedder/*.safetensors",
)
"""Patterns of what to fetch of a Redux repository."""

_DIFFUSERS = "diffusion_pytorch_model.safetensors"
_TRANSFORMERS = "model.safetensors"
_LARGEST_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True, slots=True)
class Component:
    """A folder of a checkpoint.

    ``files`` must all be there; of ``any_of`` one set must be; ``weights`` is a safetensors file
    or stands for the shards that its ``.index.json`` lists.
    """

    folder: str
    files: tuple[str, ...] = ()
    any_of: tuple[tuple[str, ...], ...] = ()
    weights: str | None = None


BASE = (
    Component("transformer", ("config.json",), weights=_DIFFUSERS),
    Component("vae", ("config.json",), weights=_DIFFUSERS),
    Component("scheduler", ("scheduler_config.json",)),
)

TEXT = (
    Component("text_encoder", ("config.json",), weights=_TRANSFORMERS),
    Component(
        "tokenizer",
        ("tokenizer_config.json",),
        any_of=(("tokenizer.json",), ("vocab.json", "merges.txt")),
    ),
    Component("text_encoder_2", ("config.json",), weights=_TRANSFORMERS),
    Component(
        "tokenizer_2",
        ("tokenizer_config.json",),
        any_of=(("tokenizer.json",), ("spiece.model",)),
    ),
)
"""Needed for prompts only; a folder may be absent as a whole."""

REDUX = (
    Component("image_encoder", ("config.json",), weights=_TRANSFORMERS),
    Component("image_embedder", ("config.json",), weights=_DIFFUSERS),
    Component("feature_extractor", ("preprocessor_config.json",)),
)


def find_missing(base: Path, redux: Path) -> list[str]:
    """One line for each file that is missing, empty or cut short; an empty list if all is well.

    Text components may be absent as whole folders; what is there of them must be complete.
    """
    problems = find_missing_base(base)
    return problems + [line for component in REDUX for line in _check(redux, component)]


def find_missing_base(base: Path) -> list[str]:
    """``find_missing`` of the base alone."""
    present = [component for component in TEXT if (base / component.folder).is_dir()]
    return [line for component in (*BASE, *present) for line in _check(base, component)]


def _check(root: Path, component: Component) -> Iterator[str]:
    folder = root / component.folder
    if not folder.is_dir():
        yield f"{folder}: the folder is missing"
        return
    for name in component.files:
        yield from _check_json(folder / name)
    if component.any_of:
        yield from _check_any(folder, component.any_of)
    if component.weights is not None:
        yield from _check_weights(folder, component.weights)


def _check_json(path: Path) -> Iterator[str]:
    problem = _problem(path)
    if problem is None:
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            problem = "is not JSON"
    if problem is not None:
        yield f"{path}: {problem}"


def _check_any(folder: Path, choices: tuple[tuple[str, ...], ...]) -> Iterator[str]:
    if not any(all(_problem(folder / name) is None for name in choice) for choice in choices):
        wanted = " or ".join(" with ".join(choice) for choice in choices)
        yield f"{folder}: needs {wanted}"


def _check_weights(folder: Path, name: str) -> Iterator[str]:
    index = folder / f"{name}.index.json"
    if not index.exists():
        yield from _check_tensors(folder / name)
        return
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        yield f"{index}: is not a shard index"
        return
    for shard in sorted(shards):
        yield from _check_tensors(folder / shard)


def _check_tensors(path: Path) -> Iterator[str]:
    problem = _problem(path) or _tensor_problem(path)
    if problem is not None:
        yield f"{path}: {problem}"


def _problem(path: Path) -> str | None:
    if not path.is_file():
        return "is missing"
    return "is empty" if path.stat().st_size == 0 else None


def _tensor_problem(path: Path) -> str | None:
    """What is wrong with a safetensors file, judged by its header and its size in bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if header_size > _LARGEST_HEADER_BYTES:
            return "is not a safetensors file (a Git LFS pointer?)"
        if 8 + header_size > size:
            return f"is cut short: {size} bytes end inside its header"
        header = file.read(header_size)
    try:
        entries = json.loads(header)
        ends = [
            entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"
        ]
    except (ValueError, KeyError, AttributeError, TypeError, IndexError):
        return "is not a safetensors file"
    expected = 8 + header_size + max(ends, default=0)
    if size != expected:
        return f"has {size} bytes instead of {expected}"
    return None
