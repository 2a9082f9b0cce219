"""A safetensors file written tensor by tensor, with all sizes known before.

``safetensors.torch.save_file`` wants all tensors in memory. The format is 8 bytes with the header's
length, a JSON header, and the tensors without gaps
(https://github.com/huggingface/safetensors#format). Wide elements come first, so that each tensor
lies at a multiple of its element's size. Knows no checkpoints.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

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
