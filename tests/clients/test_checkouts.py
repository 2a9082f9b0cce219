"""Clients that are in no registry: run from checkouts, where there are any, and never committed.

CLIENT_SOURCES names a folder with ``wavespeed-comfyui`` and ``dify-wavespeed-plugin`` in it.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from clients.environments import checkout
from clients.roster import COMFYUI, DIFY
from clients.takeover import make_certificates, nginx
from clients.trial import Trial

pytestmark = pytest.mark.clients


@pytest.mark.parametrize("case", ["run", "upload", "bad key", "bad parameter", "dead URL"])
def test_comfyui(trial: Callable[..., Trial], case: str) -> None:
    user = trial(COMFYUI, case)
    user.source = checkout("wavespeed-comfyui")
    user.check(case)


def test_dify_through_a_proxy(trial: Callable[..., Trial], tmp_path: Path) -> None:
    user = trial(DIFY, "takeover")
    user.source = checkout("dify-wavespeed-plugin")
    certificates = make_certificates(tmp_path / "certificates")
    with nginx(tmp_path / "nginx", certificates, user.live.port) as proxy:
        sandbox = user.sandbox(proxy.names, **proxy.trust)
        user.answers = sandbox.drive(DIFY.driver, user.job())
    assert sandbox.left_loopback == []
    assert user.answers["balance"] == {"value": None}
    for case in ("bad key", "bad parameter", "dead URL"):
        user.check(case)
    (url,) = user.answers["run"]["value"]
    local = url.replace("https://api.wavespeed.ai", user.live.base_url)
    user.check_picture(local)
