"""npm wavespeed: the official JavaScript SDK, today's and the last before upload tickets."""

from collections.abc import Callable

import pytest

from clients.roster import JAVASCRIPT, JAVASCRIPT_0_2
from clients.trial import Client, Trial

pytestmark = pytest.mark.clients


@pytest.mark.parametrize(
    "case", ["run", "module", "upload", "sync", "bad key", "bad parameter", "dead URL"]
)
@pytest.mark.parametrize("client", [JAVASCRIPT, JAVASCRIPT_0_2], ids=lambda client: client.version)
def test_sdk(trial: Callable[..., Trial], client: Client, case: str) -> None:
    trial(client, case).check(case)
