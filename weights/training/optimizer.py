"""Muon for the matrices inside a network, AdamW for everything else, as one optimizer.

Muon: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024),
https://kellerjordan.github.io/posts/muon/, whose Newton-Schulz coefficients are used here
(reference code under MIT). Knows no models; callers say which parameters are matrices.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from training.precision import compute_dtype

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_MOMENTUM = 0.95


@dataclass(frozen=True, slots=True)
class Rates:
    """Learning rates per step; ``betas`` and ``weight_decay`` as in AdamW."""

    muon: float
    adamw: float
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    clip_norm: float = 1.0


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices to ``(N, rows, columns)``, roughly.

    Singular values end between about 0.7 and 1.2 (Newton-Schulz, quintic).
    """
    a, b, c = _NEWTON_SCHULZ
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = (x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)).to(compute_dtype())
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    nearest: Tensor = (x.mT if is_tall else x).float()
    return nearest


class MuonAdamW:
    """Steps ``named`` parameters; ``is_matrix(name, parameter)`` chooses those Muon takes.

    Convolution kernels ``(out, in, h, w)`` count as ``(out, in·h·w)`` matrices.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        is_matrix: Callable[[str, Tensor], bool],
        rates: Rates,
    ) -> None:
        pairs = list(named)
        self._rates = rates
        self._matrices = [p for name, p in pairs if is_matrix(name, p)]
        self._others = [p for name, p in pairs if not is_matrix(name, p)]
        self._momenta = [torch.zeros_like(p) for p in self._matrices]
        self._adamw = torch.optim.AdamW(
            self._others,
            lr=rates.adamw,
            betas=rates.betas,
            weight_decay=rates.weight_decay,
            foreach=True,
        )

    @torch.no_grad()
    def step(self, factor: float = 1.0) -> None:
        """Update with gradients in place, both learning rates times ``factor``; clear them.

        Gradients of AdamW's share are clipped to a common norm; Muon's need no clipping.
        """
        torch.nn.utils.clip_grad_norm_(self._others, self._rates.clip_norm)
        for alike in self._by_shape():
            self._step_matrices(alike, factor * self._rates.muon)
        for group in self._adamw.param_groups:
            group["lr"] = self._rates.adamw * factor
        self._adamw.step()
        self.zero_grad()

    def _by_shape(self) -> Iterable[list[tuple[Tensor, Tensor]]]:
        """Matrices that have gradients, with their momenta, in groups that are stepped at once."""
        groups: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for parameter, momentum in zip(self._matrices, self._momenta, strict=True):
            if parameter.grad is not None:
                groups.setdefault(parameter.shape, []).append((parameter, momentum))
        return groups.values()

    def _step_matrices(self, group: list[tuple[Tensor, Tensor]], rate: float) -> None:
        parameters = [parameter for parameter, _ in group]
        momenta = [momentum for _, momentum in group]
        grads = [cast(Tensor, parameter.grad) for parameter in parameters]
        torch._foreach_mul_(momenta, _MOMENTUM)
        torch._foreach_add_(momenta, grads)
        nesterov = torch.stack(torch._foreach_add(grads, momenta, alpha=_MOMENTUM)).flatten(2)
        updates = orthogonalize(nesterov).view(-1, *parameters[0].shape)
        rows, columns = nesterov.shape[1:]
        if self._rates.weight_decay:
            torch._foreach_mul_(parameters, 1 - rate * self._rates.weight_decay)
        scale = -rate * max(1.0, rows / columns) ** 0.5
        torch._foreach_add_(parameters, list(updates.unbind()), alpha=scale)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in (*self._matrices, *self._others):
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to go on as if nothing had happened."""
        return {"momenta": self._momenta, "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state that ``state_dict`` gave."""
        for own, saved in zip(self._momenta, state["momenta"], strict=True):
            own.copy_(saved)
        self._adamw.load_state_dict(state["adamw"])
