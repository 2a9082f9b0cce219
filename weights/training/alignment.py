"""Teaches attention early on where each Redux token comes from.

Redux tokens all have RoPE position 0, so the transformer must learn from their content which place
of the picture they show. For the first hundreds of steps the first heads of every block are pulled
to look, from a latent token, at the Redux tokens of the same place. Knows no data.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from redux_pipelines import sampling
from redux_pipelines.sampling import Grid
from training.model import MiniModel

_HEADS = 2
_SPREAD = 0.7
"""Standard deviation of the target, in Redux tokens."""


class AlignmentLoss:
    """Reads queries and keys of the blocks while ``recording``; then computes the loss."""

    def __init__(self, model: MiniModel) -> None:
        self._model = model
        self._sizes = model.sizes
        self._pairs: list[dict[str, Tensor]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what attention computes inside the ``with`` block."""
        transformer = self._model.transformer
        self._pairs, handles = [], []
        for block in transformer.transformer_blocks:
            handles += self._watch(block.attn.norm_q, block.attn.norm_added_k)
        for block in transformer.single_transformer_blocks:
            handles += self._watch(block.attn.norm_q, block.attn.norm_k)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, queries: Any, keys: Any) -> list[Any]:
        pair: dict[str, Tensor] = {}
        self._pairs.append(pair)

        def keeper(name: str) -> Any:
            return lambda _module, _inputs, output: pair.__setitem__(name, output)

        return [
            queries.register_forward_hook(keeper("queries")),
            keys.register_forward_hook(keeper("keys")),
        ]

    def __call__(self, grid: Grid, icons: int) -> Tensor:
        """Mean cross entropy of the watched heads to a Gaussian at the latent token's place.

        The batch's first ``icons`` scenes show the picture undistorted in the middle of the grid,
        the others stretched over all of it (``SceneSource``).
        """
        count = len(self._pairs[0]["keys"])
        middle, whole = self._target(grid, _middle(grid)), self._target(grid, grid)
        target = torch.stack([middle] * icons + [whole] * (count - icons))
        rotation = self._model.transformer.pos_embed(sampling.image_ids(grid))
        losses = [self._block_loss(pair, rotation, target) for pair in self._pairs]
        return torch.stack(losses).mean()

    def _block_loss(self, pair: dict[str, Tensor], rotation: Any, target: Tensor) -> Tensor:
        first = self._sizes.text_tokens
        redux = slice(first, first + self._sizes.encoder_grid**2)
        queries = pair["queries"][:, -target.shape[1] :, :_HEADS].float()
        keys = pair["keys"][:, redux, :_HEADS].float()
        turned = apply_rotary_emb(queries, rotation, sequence_dim=1)
        scores = torch.einsum("bqhd,bkhd->bhqk", turned, keys) / math.sqrt(keys.shape[-1])
        return -(target[:, None] * F.log_softmax(scores, -1)).sum(-1).mean()

    def _target(self, grid: Grid, shown: Grid) -> Tensor:
        """Where each latent token should look, ``(L, N)``, if the picture fills ``shown``.

        Rows sum to 1. That part lies in the middle; tokens around it look at the nearest edge.
        """
        side = self._sizes.encoder_grid
        ids = sampling.image_ids(grid)
        top, left = (grid.rows - shown.rows) / 2, (grid.columns - shown.columns) / 2
        rows = (ids[:, 1] + 0.5 - top) / shown.rows * side - 0.5
        columns = (ids[:, 2] + 0.5 - left) / shown.columns * side - 0.5
        places = torch.arange(side * side)
        down = rows[:, None] - places[None] // side
        across = columns[:, None] - places[None] % side
        return torch.softmax(-(down**2 + across**2) / (2 * _SPREAD**2), dim=1)


def _middle(grid: Grid) -> Grid:
    """The largest square."""
    return Grid(min(grid.rows, grid.columns), min(grid.rows, grid.columns))
