"""What tells one checkpoint from another: a digest of its files, wherever they lie.

Standard library only; reads a sample of the large files, so that 34 GB cost no time. Two trainings
of one network differ nearly everywhere, and so in the sample. This is no defence against somebody
who means to deceive.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from redux_weights.layout import BASE_FILES, REDUX_FILES

_SAMPLES = 64
_SAMPLE_BYTES = 4096
_WHOLE_BYTES = 2 * _SAMPLES * _SAMPLE_BYTES
_DIGITS = 12


def weights_digest(base: Path, redux: Path) -> str:
    """Twelve digits for the files of a FLUX.1 base and a Redux, in diffusers' layout.

    Copies of a checkpoint have the same, and so have a folder and a download of it.
    """
    digest = hashlib.sha256()
    for root, patterns in ((base, BASE_FILES), (redux, REDUX_FILES)):
        for path in _files(root, patterns):
            digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
            for part in _sample(path):
                digest.update(part)
    return digest.hexdigest()[:_DIGITS]


def _files(root: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files of a checkpoint, in one order; not what says who made it."""
    found = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.name != "model_index.json")


def _sample(path: Path) -> Iterator[bytes]:
    """All of a small file; of a large one its beginning and parts spread over the rest."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            yield file.read()
            return
        for number in range(_SAMPLES):
            file.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            yield file.read(_SAMPLE_BYTES)
