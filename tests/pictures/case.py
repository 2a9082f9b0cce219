"""What a case of the corpus is: a file, and the pixels that it means or the reasons to refuse it.

Files are made only when a case is run, so that collecting hundreds of them costs nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy.typing as npt

Array = npt.NDArray[Any]


class Within(NamedTuple):
    """How far, in levels of 255, any channel of a pixel and all of them on average may be off."""

    most: float
    mean: float


EXACT = Within(0, 0)
ROUNDED = Within(1, 0.6)
"""Scaled from other than 8 bits, or laid on white: each decoder rounds in its own way."""
BLENDED = Within(2, 1)
"""Both of these."""
CONVERTED = Within(3, 1)
"""Through a profile: littleCMS rounds, and who moves colours by 2 levels may leave them."""
LOSSY = Within(14, 2.5)
"""Encoded with loss at a high quality, from a smooth picture."""


class Skip(Exception):
    """What is missing on this machine, and how to get it."""


@dataclass(frozen=True)
class Made:
    """A file, and (height, width, 3) of uint8 that it shows; without these it must be refused."""

    data: bytes
    expected: Array | None = None
    within: Within = EXACT
    refused: tuple[str, ...] = ()
    second: str = ""  # whose word is asked, too: "vips", "magick" or nobody's
    second_within: Within | None = None
    reduced: bool = False  # the answer may be smaller: it is compared after averaging over squares


@dataclass(frozen=True)
class Case:
    """One file. ``may_refuse`` has reasons for which an unusual but sound file may be refused."""

    name: str
    make: Callable[[], Made]
    may_refuse: tuple[str, ...] = field(default=())

    @property
    def family(self) -> str:
        """The format: what stands before the name's first slash."""
        return self.name.split("/")[0]


def refusal(name: str, data: bytes | Callable[[], bytes], *reasons: str) -> Case:
    """A file that must be refused for one of ``reasons``."""
    return Case(name, lambda: Made(data() if callable(data) else data, refused=reasons))


def unique(cases: Iterable[Case]) -> list[Case]:
    """The cases as a list, of which no two have one name."""
    listed = list(cases)
    names = [case.name for case in listed]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"names that stand twice: {sorted(twice)}"
    return listed
