"""From a request's pictures to sets of Redux tokens: what counts, how coarsely, and how much.

A token that stands for several, or for a part of one, says so by its weight, so that pooling keeps
the picture's part in attention. Knows no text and no transformer.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from redux_pipelines.conditioning.image import ImageEncoder, kept_tokens
from redux_pipelines.conditioning.tokens import Tokens
from redux_pipelines.contract.batching import weights_of
from redux_pipelines.contract.types import GenerationRequest
from redux_pipelines.errors import RequestError


@torch.inference_mode()
def redux_tokens(encoder: ImageEncoder, request: GenerationRequest) -> tuple[Tokens, ...]:
    """All pictures of ``request`` that count at all, in their order.

    Raises ``RequestError`` where nothing is left of a picture: for its mask, or because it is too
    narrow for a letterbox.
    """
    sets: list[Tokens] = []
    pairs = zip(request.pictures, weights_of(request), strict=True)
    for index, (picture, weight) in enumerate(pairs):
        if weight == 0.0:
            continue
        mask = request.mask if index == 0 else None
        seen = encoder.preprocess(picture, request.fit, mask)
        kept = None if seen.coverage is None else kept_tokens(seen.coverage)
        if kept is not None and not kept.any():
            raise _nothing_left(kept, index, is_narrow=seen.is_narrow)
        values = encoder.encode(seen)
        for pooled, mass in pool(values, encoder.grid, request.redux_pooling, kept):
            sets.append(Tokens(pooled, log_weight=math.log(weight * mass)))
    return tuple(sets)


def worth_pictures(request: GenerationRequest, grid: tuple[int, int]) -> int:
    """How many pictures not pooled have as many tokens, at least 1; masks are not looked at."""
    count = sum(weight > 0.0 for weight in weights_of(request))
    left = math.prod(min(side, request.redux_pooling) for side in grid)
    return max(1, math.ceil(count * left / math.prod(grid)))


def pool(
    values: Tensor, grid: tuple[int, int], side: int, kept: Tensor | None = None
) -> Iterator[tuple[Tensor, float]]:
    """Averages over a grid of ``side`` × ``side`` equal areas, and how many tokens each replaces.

    ``values (N, D)`` lie row by row on ``grid``, of which tokens that are not ``kept`` are left
    out. An area that cuts a token has its share of it, so that without ``kept`` all areas replace
    as many. Areas of equal mass come together, ``(M, D)``; where a grid has no more than ``side``,
    its tokens come as they are.
    """
    if kept is not None and bool(kept.all()):
        kept = None
    if side >= max(grid):
        yield values if kept is None else values[kept.flatten().to(values.device)], 1.0
        return
    rows, columns = (_shares(count, min(side, count)) for count in grid)
    present = torch.ones(grid, dtype=torch.int64) if kept is None else kept.long()
    masses = (rows @ present @ columns.T).flatten()  # whole numbers, of parts of a token
    parts = rows.shape[0] * columns.shape[0]
    kind = torch.promote_types(values.dtype, torch.float32)
    weighted = values.reshape(*grid, -1).to(kind)
    weighted = weighted * present[..., None].to(weighted)
    sums = torch.einsum("ir,jc,rcd->ijd", rows.to(weighted), columns.to(weighted), weighted)
    means = sums.flatten(0, 1) / masses.clamp_min(1)[:, None].to(weighted)
    for mass in sorted(set(masses[masses > 0].tolist())):
        yield means[(masses == mass).to(means.device)].to(values.dtype), mass / parts


def _shares(count: int, areas: int) -> Tensor:
    """Of each area (rows) in each of ``count`` tokens in line, in parts of 1 / ``areas``."""
    area, token = torch.arange(areas)[:, None] * count, torch.arange(count) * areas
    ends = torch.minimum(area + count, token + areas)
    return (ends - torch.maximum(area, token)).clamp_min(0)


def _nothing_left(kept: Tensor, index: int, *, is_narrow: bool) -> RequestError:
    columns, rows = kept.shape[1], kept.shape[0]
    if is_narrow:
        name = "image" if index == 0 else f"images[{index - 1}]"
        return RequestError(
            f"{name} is too narrow for fit letterbox: in a square of {columns} × {rows} tokens it "
            "fills half of none. Use fit squash or center, or a picture whose sides differ less"
        )
    return RequestError(
        "the mask leaves nothing of image: for none of its parts that a token stands for "
        f"({columns} × {rows} of them) half or more of it is white. Make the "
        "white part larger, or leave the mask out"
    )
