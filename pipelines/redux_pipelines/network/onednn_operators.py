"""FLUX's blocks on a CPU in float32: plain torch, with oneDNN's products and none of the long rows.

A single block's MLP is added to, not put beside, what attention gives: the product with ``linear2``
is the sum of those with its two column ranges. So the 7 H numbers of a row are never there at once,
nor an MLP's 4 H for all rows. Knows no blocks.
"""

from torch import Tensor

from redux_pipelines import onednn
from redux_pipelines.fp8.linear import ALL, Fp8Linear, Linear
from redux_pipelines.network.layers import modulate
from redux_pipelines.network.operators import Attend, Residual, SingleRows, TorchOperators


class OneDnnOperators(TorchOperators):
    """``TorchOperators`` but for its products. Takes no layers in fp8: ``TypeError``."""

    name = "onednn"

    def normed_linear(
        self, stream: Residual, shift: Tensor, scale: Tensor, linear: Linear, rows: slice = ALL
    ) -> tuple[Tensor, Tensor]:
        """One product of oneDNN with the modulated rows."""
        x = self.settle(stream)
        weight, bias = _parameters(linear)
        return x, onednn.linear(modulate(x, shift, scale), weight[rows], bias[rows])

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        """One product of oneDNN."""
        return onednn.linear(x, *_parameters(linear))

    def normed_mlp(
        self, stream: Residual, shift: Tensor, scale: Tensor, up: Linear, down: Linear
    ) -> tuple[Tensor, Tensor]:
        """Both products for a few rows at a time: what lies between stays in the caches."""
        x = self.settle(stream)
        rows = modulate(x, shift, scale)
        return x, onednn.mlp(rows, *_parameters(up), *_parameters(down))

    def single_in(
        self, stream: Residual, shift: Tensor, scale: Tensor, linear1: Linear, linear2: Linear
    ) -> SingleRows:
        """The MLP is through ``linear2`` already."""
        x, width = self.settle(stream), stream.x.shape[-1]
        rows = modulate(x, shift, scale)
        (up, up_bias), (down, down_bias) = _parameters(linear1), _parameters(linear2)
        qkv = onednn.linear(rows, up[: 3 * width], up_bias[: 3 * width])
        mlp = onednn.mlp(rows, up[3 * width :], up_bias[3 * width :], down[:, width:], down_bias)
        return SingleRows(x, qkv, mlp)

    def single_out(self, rows: SingleRows, attend: Attend, linear2: Linear) -> Tensor:
        """Add attention's columns of ``linear2`` to the MLP's result."""
        weight, _ = _parameters(linear2)
        return onednn.add_linear(attend(None), weight[:, : rows.x.shape[-1]], rows.mlp)


def _parameters(linear: Linear) -> tuple[Tensor, Tensor]:
    if isinstance(linear, Fp8Linear):
        raise TypeError("oneDNN's products are float32's: layers in fp8 need TorchOperators")
    return linear.weight, linear.bias
