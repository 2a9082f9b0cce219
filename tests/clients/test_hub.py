"""PyPI huggingface_hub, whose InferenceClient has wavespeed among its providers."""

from collections.abc import Callable

import pytest

from clients.roster import HUB
from clients.trial import Trial

pytestmark = pytest.mark.clients


@pytest.mark.parametrize(
    "case", ["run", "local file", "bytes", "bad key", "bad parameter", "dead URL"]
)
def test_hub(trial: Callable[..., Trial], case: str) -> None:
    trial(HUB, case).check(case)
