"""The embedded model, for the tests that measure it."""

import pytest

from redux_pipelines.contract.types import GenerationRequest
from redux_pipelines.loading.load import load_pipeline


@pytest.fixture(scope="session")
def pipeline():
    return load_pipeline(model="mini", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def vary(pipeline):
    def run(image, *, through=pipeline, **fields):
        *_, result = through.generate(GenerationRequest(image, **fields))
        return result.images[0]

    return run
