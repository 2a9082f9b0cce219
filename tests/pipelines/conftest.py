"""Tiny checkpoints, pictures and diffusers' own pipelines as the oracle."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from redux_pipelines.contract.types import GenerationRequest, Progress, Result

Request = Callable[..., GenerationRequest]


@dataclass(frozen=True)
class Checkpoint:
    base: Path
    redux: Path


def _build(tmp_path_factory: pytest.TempPathFactory, name: str, **options: Any) -> Checkpoint:
    from redux_pipelines.loading.tiny import build_tiny

    return Checkpoint(*build_tiny(tmp_path_factory.mktemp(name), **options))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, which stall each other on shared cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> Any:
    """A small random network, as diffusers has it."""
    from pipelines.networks import diffusers_model

    return diffusers_model()


@pytest.fixture(scope="module")
def ours(model: Any) -> Any:
    """The engine with the weights of ``model``."""
    from pipelines.networks import engine

    return engine(model)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return _build(tmp_path_factory, "tiny")


@pytest.fixture(scope="session")
def tiny_schnell(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return _build(tmp_path_factory, "schnell", guidance=False)


@pytest.fixture(scope="session")
def tiny_f8(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return _build(tmp_path_factory, "f8", vae_factor=8)


def _load(checkpoint: Checkpoint, **options: Any) -> Any:
    from redux_pipelines.loading.load import load_pipeline

    options = {"device": "cpu", "dtype": "float32", **options}
    return load_pipeline(base=checkpoint.base, redux=checkpoint.redux, **options)


@pytest.fixture(scope="session")
def load() -> Callable[..., Any]:
    """Load a ``Checkpoint`` in float32 on the CPU, unless told otherwise."""
    return _load


@pytest.fixture(scope="session")
def pipeline(tiny: Checkpoint) -> Any:
    return _load(tiny)


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """Two colours and a bright square: something to recognise."""
    pixels = np.zeros((96, 128, 3), np.uint8)
    pixels[:, :64] = (200, 40, 30)
    pixels[:, 64:] = (20, 60, 190)
    pixels[30:60, 40:90] = 250
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def request_for(picture: Image.Image) -> Request:
    """Requests for 512 × 512 in two steps, unless told otherwise."""

    def build(**fields: Any) -> GenerationRequest:
        defaults: dict[str, Any] = {
            "image": picture,
            "width": 512,
            "height": 512,
            "num_inference_steps": 2,
        }
        return GenerationRequest(**{**defaults, **fields})

    return build


@pytest.fixture(scope="session")
def finish() -> Callable[[Iterator[Progress | Result]], Result]:
    """Run a generator to its end and return the result."""
    return _finish


def _finish(events: Iterator[Progress | Result]) -> Result:
    *_, last = events
    assert isinstance(last, Result)
    return last


@pytest.fixture(scope="session")
def difference() -> Callable[[Image.Image, Image.Image], int]:
    """Largest difference of any pixel, in grey levels of 255."""
    return _difference


def _difference(first: Image.Image, second: Image.Image) -> int:
    assert first.size == second.size
    pixels = [np.asarray(image).astype(np.int16) for image in (first, second)]
    return int(np.abs(pixels[0] - pixels[1]).max())
