"""Linear layers in fp8: e4m3 weights with a scale per output row, inputs quantised row by row.

The product is ``torch._scaled_mm``, which applies both scales to float32 sums. Rows are quantised
by the convention of ``redux_kernels``: ``(q, row_scale)``, so that a kernel which ends in a norm or
a GELU can hand them over ready. Knows no blocks, no checkpoints, and not where it may run
(``fp8.self_test`` does).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redux_kernels.reference import quantize_rows

E4M3 = torch.float8_e4m3fn
ALL = slice(None)


TRANSPOSED = {"columns": "weight", "column_scale": "weight_scale"}
"""Parameters of an ``Fp8Linear`` that are kept as the product takes them, and what they are of."""


class Fp8Linear(nn.Module):
    """``nn.Linear`` with ``weight`` (out, in) in e4m3 and ``weight_scale`` (out, 1) in float32.

    They are kept transposed, as ``columns`` (in, out), whose columns lie together, and
    ``column_scale`` (1, out): a step would else transpose hundreds. ``bias`` (out,) is in the dtype
    of what comes out. All are made empty: ``loading.flux_weights`` fills them.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.columns = _frozen(torch.empty(out_features, in_features, dtype=E4M3).t())
        self.column_scale = _frozen(torch.empty(1, out_features))
        self.bias = _frozen(torch.empty(out_features))

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor) -> "Fp8Linear":
        """The fp8 layer nearest to ``weight (out, in)``."""
        with torch.device("meta"):
            made = cls(weight.shape[1], weight.shape[0])
        made.columns, made.column_scale = (_frozen(each.t()) for each in quantize_rows(weight))
        made.bias = _frozen(bias)
        return made

    @property
    def weight(self) -> Tensor:
        """``(out, in)``, e4m3: a view."""
        return self.columns.t()

    @property
    def weight_scale(self) -> Tensor:
        """``(out, 1)``, float32: a view."""
        return self.column_scale.t()

    def forward(self, x: Tensor, rows: slice = ALL) -> Tensor:
        """``x (…, in)`` to ``(…, out)`` in its dtype; see ``forward_quantized`` for ``rows``."""
        q, row_scale = (each.flatten(0, -2) for each in quantize_rows(x))
        out = self.forward_quantized(q, row_scale, x.dtype, rows)
        return out.view(*x.shape[:-1], out.shape[-1])

    def forward_quantized(
        self, q: Tensor, row_scale: Tensor, out_dtype: torch.dtype, rows: slice = ALL
    ) -> Tensor:
        """Rows that are quantised already: ``q (n, in)`` in e4m3, ``row_scale (n, 1)`` in float32.

        ``rows`` computes only those columns of the output, as if the weight had no other rows.
        ``(n, out)`` in ``out_dtype``, which must be the bias's; on a GPU torch wants bfloat16, and
        multiples of 16 for ``in`` and ``out``. There it may use the tensor cores' short sums.
        """
        own = parameters_of(self)
        columns, scale, bias = own["columns"], own["column_scale"], own["bias"]
        if rows is not ALL:
            columns, scale, bias = columns[:, rows], scale[:, rows], bias[rows]
        return torch._scaled_mm(
            q,
            columns,
            scale_a=row_scale,
            scale_b=scale,
            bias=bias,
            out_dtype=out_dtype,
            use_fast_accum=q.is_cuda,
        )


Linear = nn.Linear | Fp8Linear


def project(linear: Linear, x: Tensor, rows: slice = ALL) -> Tensor:
    """``linear`` of ``x (…, in)``, or those ``rows`` of its weight alone."""
    if isinstance(linear, Fp8Linear):
        return linear(x, rows)  # type: ignore[no-any-return]  # modules are called untyped
    own = parameters_of(linear)
    weight, bias = own["weight"], own["bias"]
    if rows is not ALL:
        weight, bias = weight[rows], bias[rows]
    return F.linear(x, weight, bias)


def parameters_of(layer: nn.Module) -> dict[str, Any]:
    """A layer's own parameters by name: ``layer.weight`` takes ten times as long to be found.

    A step of FLUX.1 asks for hundreds of them.
    """
    return layer._parameters


def layers_of(module: nn.Module) -> dict[str, Any]:
    """The modules right within a module by name, for the same reason."""
    return module._modules


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
