"""The image encoder of a Redux checkpoint alone, to say how alike two pictures are.

SigLIP's last hidden state, averaged over its tokens (its attention head is not part of what Redux
was trained with). Always on the CPU: what it serves is a comparison, not an image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub import snapshot_download
from numpy.typing import NDArray
from PIL import Image
from transformers import SiglipVisionModel

from redux_pipelines.conditioning.image import Preprocessing
from redux_pipelines.errors import WeightsError
from redux_pipelines.loading.load import FLUX_REDUX, MINI, silence_bars
from redux_weights.embedded import find_mini

_PARTS = ["image_encoder/*", "feature_extractor/*"]


class Vision(NamedTuple):
    """An encoder under the name of its weights."""

    name: str
    model: SiglipVisionModel
    preprocessing: Preprocessing

    @torch.inference_mode()
    def embed(self, picture: Image.Image) -> NDArray[np.float32]:
        """The features ``(D,)`` of a picture, of length 1."""
        pixels = self.preprocessing.apply(picture)
        hidden = self.model(pixel_values=pixels).last_hidden_state[0].mean(0)
        features: NDArray[np.float32] = torch.nn.functional.normalize(hidden, dim=0).numpy()
        return features


def load_vision(redux: str = "") -> Vision:
    """The encoder in the folder ``redux``; without one, the best that is on this machine.

    That is FLUX.1-Redux-dev's if the Hub's cache has it, else the embedded model's. Downloads
    nothing.

    Raises:
        WeightsError: the folder holds none, or there is none at all.
    """
    silence_bars()
    if redux:
        return _load(Path(redux).name, Path(redux))
    cached = _cached()
    if cached is not None:
        return _load("FLUX.1-Redux-dev", cached)
    try:
        return _load(MINI, find_mini().redux)
    except FileNotFoundError as error:
        raise WeightsError(str(error)) from error


def _cached() -> Path | None:
    try:
        place = Path(snapshot_download(FLUX_REDUX, allow_patterns=_PARTS, local_files_only=True))
    except (OSError, ValueError):
        return None
    return place if (place / "image_encoder" / "config.json").is_file() else None


def _load(name: str, folder: Path) -> Vision:
    sequence: Sequence[str] = ("image_encoder", "feature_extractor/preprocessor_config.json")
    for part in sequence:
        if not (folder / part).exists():
            raise WeightsError(f"{folder} is no Redux checkpoint: it has no {part}")
    try:  # from_pretrained puts it into inference mode
        model = SiglipVisionModel.from_pretrained(folder / "image_encoder", dtype=torch.float32)
    except (OSError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{folder / 'image_encoder'} cannot be loaded: {error}") from error
    preprocessing = Preprocessing.read(folder / "feature_extractor" / "preprocessor_config.json")
    return Vision(name, model, preprocessing)
