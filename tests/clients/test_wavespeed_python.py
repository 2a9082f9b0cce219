"""PyPI wavespeed: the official Python SDK, today's, the last 1.0 before tickets, and 0.0.5."""

from collections.abc import Callable

import pytest

from clients.roster import PYTHON, PYTHON_0, PYTHON_1
from clients.trial import Client, Trial

pytestmark = pytest.mark.clients


@pytest.mark.parametrize(
    "case", ["run", "module", "upload", "sync", "bad key", "bad parameter", "dead URL"]
)
@pytest.mark.parametrize("client", [PYTHON, PYTHON_1], ids=lambda client: client.version)
def test_sdk(trial: Callable[..., Trial], client: Client, case: str) -> None:
    trial(client, case).check(case)


@pytest.mark.parametrize("case", ["run", "async", "later", "bad key", "bad parameter", "dead URL"])
def test_first_version(trial: Callable[..., Trial], case: str) -> None:
    trial(PYTHON_0, case).check(case)
