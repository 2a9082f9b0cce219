"""What ``flux-redux doctor`` finds, and how it judges free space. Knows none of its checks."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from redux_pipelines.memory.model_sizes import FLUX_DEV

FLUX_BYTES = 2 * FLUX_DEV.parameters
"""Files of FLUX.1 [dev] and Redux in bfloat16."""

_NO_SPACE_BYTES = 64 * 2**20


class Level(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"  # works, but worth knowing
    MISSING = "MISSING"  # `serve` needs it


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    level: Level
    subject: str
    text: str


def check_space(subject: str, folder: Path, wanted_bytes: int) -> Iterator[Finding]:
    """Whether the disk of ``folder``, which need not exist, has room for ``wanted_bytes``."""
    free_bytes = shutil.disk_usage(existing(folder)).free
    if free_bytes < _NO_SPACE_BYTES:
        text = f"{gigabytes(free_bytes)} free at {folder}: the disk is full"
        yield Finding(Level.MISSING, subject, text)
    elif free_bytes < wanted_bytes:
        text = f"{gigabytes(free_bytes)} free at {folder}, less than {gigabytes(wanted_bytes)}"
        yield Finding(Level.NOTE, subject, text)
    else:
        yield Finding(Level.OK, subject, f"{gigabytes(free_bytes)} free")


def existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there."""
    return next(place for place in (path, *path.parents) if os.path.exists(place))


def gigabytes(size_bytes: int) -> str:
    """A size as people read it."""
    return f"{size_bytes / 1e9:.1f} GB"
