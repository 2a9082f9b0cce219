"""The official ``wavespeed`` JavaScript SDK, unmodified, against this server.

More of it, its older version and all other clients: tests/clients, run by make test-clients.
"""

import re
from typing import Any

import pytest

from clients.environments import environment
from clients.sandbox import Sandbox
from e2e.live import LiveServer, download, free_port
from e2e.picture_site import PICTURES

MODEL = "wavespeed-ai/flux-pro-redux"
BODY = {"size": "512*768", "seed": 7, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def answers(tiny: LiveServer, site: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the SDK brought in each case; all are tried in one process."""
    home = tmp_path_factory.mktemp("node")
    (home / "photo.jpg").write_bytes(PICTURES["/photo.jpg"])
    job = {
        "url": tiny.base_url,
        "key": tiny.key,
        "model": MODEL,
        "body": {**BODY, "image": f"{site}/photo.jpg"},
        "file": str(home / "photo.jpg"),
        "dead": f"http://127.0.0.1:{free_port()}/gone.png",
    }
    sandbox = Sandbox(environment("npm-wavespeed-0.3.2"), home)
    found = sandbox.drive("wavespeed_js.cjs", job)
    assert sandbox.left_loopback == []
    return found


def picture(answer: Any) -> bytes:
    """The pixels of the one picture."""
    (url,) = answer["value"]
    image = download(url)
    assert (image.format, image.size, image.info["Seed"]) == ("PNG", (512, 768), "7")
    return image.tobytes()


def test_this_is_the_version_that_is_spoken_of(answers: Any) -> None:
    assert answers["version"] == {"value": "0.3.2"}


@pytest.mark.parametrize("case", ["upload", "sync", "module"])
def test_every_way_to_run_it_brings_the_same_picture(answers: Any, case: str) -> None:
    assert picture(answers[case]) == picture(answers["run"])


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("bad key", r"HTTP 401: .*Unknown or revoked API key"),
        ("bad parameter", r"HTTP 400: .*num_images must be an .*from 1 to 4"),
        ("dead URL", r"task_id: \w{32}.*'127\.0\.0\.1' could not be reached"),
    ],
)
def test_user_is_told_what_is_wrong(answers: Any, case: str, text: str) -> None:
    assert re.search(text, answers[case]["error"]), answers[case]
