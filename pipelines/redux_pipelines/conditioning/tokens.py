"""What a request is conditioned on, and how its tokens become rows of the network.

Text and Redux tokens all have RoPE position 0 and share their modulation: they are a set, and
tokens that enter equal stay equal through every block. So equal tokens become one row, and how
many they are, or how much a picture shall count, is a number added to the row's key logits.
Knows no network.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from redux_pipelines.attention.groups import KeyGroup


@dataclass(frozen=True, slots=True)
class Tokens:
    """Conditioning tokens ``values (N, D)``, each standing for ``copies`` equal ones.

    They all have RoPE position 0, so they are a set: their order means nothing. ``log_weight`` is
    added to their attention logits: for a picture that shall count with strength *s* it is log s,
    and at minus infinity the tokens are as good as absent.
    """

    values: Tensor
    copies: int = 1
    log_weight: float = 0.0

    @property
    def key_bias(self) -> float:
        """What is added to the key logits of a row: n equal keys are one key with + log n."""
        return self.log_weight + math.log(self.copies)

    def expanded(self) -> Tensor:
        """All ``N · copies`` tokens, written out."""
        return self.values.repeat(self.copies, 1)


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What steers a request: text tokens, Redux tokens, pooled text ``vec (P,)``, guidance.

    ``redux`` holds one set of tokens per picture.
    """

    txt: Tokens
    redux: tuple[Tokens, ...]
    vec: Tensor
    guidance: float

    def present(self) -> tuple[Tokens, ...]:
        """The sets of tokens that count at all."""
        return tuple(each for each in (self.txt, *self.redux) if each.log_weight != -math.inf)


@dataclass(frozen=True, slots=True)
class FoldedRows:
    """Text stream ``values (T, D)`` and the groups of all keys: its own, then the image's."""

    values: Tensor
    groups: tuple[KeyGroup, ...]


def fold_tokens(
    conditioning: Conditioning, img_rows: int, row_multiple: int = 1, least: int = 2
) -> FoldedRows:
    """One row per distinct token; with the ``img_rows`` image rows a multiple of ``row_multiple``.

    Rows that only fill up are zeros in front, and no query sees them. Rows of one bias are
    neighbours, and those without come last, where they share a group with the image's: fewer
    groups are fewer attention calls. There are ``least`` rows at least.
    """
    sets = sorted(conditioning.present(), key=lambda each: (each.key_bias == 0.0, each.key_bias))
    values = torch.cat([each.values for each in sets])
    groups = [KeyGroup(len(each.values), each.key_bias) for each in sets]
    filling = -(len(values) + img_rows) % row_multiple
    missing = max(0, least - len(values) - filling)
    filling += -(-missing // row_multiple) * row_multiple
    if filling:
        values = torch.cat([values.new_zeros(filling, values.shape[1]), values])
        groups.insert(0, KeyGroup(filling, -math.inf))
    return FoldedRows(values, _joined([*groups, KeyGroup(img_rows, 0.0)]))


def _joined(groups: Iterable[KeyGroup]) -> tuple[KeyGroup, ...]:
    """Neighbours of equal bias as one group."""
    joined: list[KeyGroup] = []
    for group in groups:
        if joined and joined[-1].bias == group.bias:
            group = KeyGroup(joined.pop().rows + group.rows, group.bias)
        joined.append(group)
    return tuple(joined)
