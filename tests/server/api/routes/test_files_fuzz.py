"""Paths under ``/files/`` that were not signed by us: nothing is read, nothing breaks."""

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from e2e.live import a_picture
from redux_server.api.services import Services
from server.in_process import Api

KEY = f"{'a' * 32}/1/0.png"
PARTS = (
    "..", ".", "%2e%2e", "%2E%2E%2F", "..%2f", "%252e%252e", "..%5c", "%00", "%0d%0a", "", "/",
    "//", "etc", "passwd", "tasks.db", "blobs", "outside.png", "0.png", "input", "%c0%ae%c0%ae",
    "%ef%bc%8e%ef%bc%8e", "~", "C:", "file:", "%2fetc%2fpasswd", "a" * 300, "%ff", "link", "1",
)  # fmt: skip
OUTSIDE = b"not for anybody"


@pytest.fixture
def scene(
    build_services: Callable[..., Services], build_api: Callable[..., Api], tmp_path: Path
) -> tuple[Api, str]:
    """An API, and the signed path of a picture; beside its folder lies what nobody may read."""
    services = build_services()
    services.blobs.put(KEY, a_picture())
    for folder in (tmp_path, services.settings.data_dir):
        (folder / "outside.png").write_bytes(OUTSIDE)
    (services.settings.blobs_dir / "link").symlink_to(tmp_path)
    return build_api(services), services.signer.path(KEY, time.time() + 600)


def unsigned_paths(signed: str, count: int, seed: int) -> list[str]:
    """Paths made of a signed one and of what has opened other servers' folders."""
    rng = random.Random(seed)
    _, files, signature, expiry, *key = signed.split("/")
    made: list[str] = []
    while len(made) < count:
        head = rng.choice(([files], [files, signature], [files, signature, expiry]))
        middle = rng.choices([*PARTS, *key], k=rng.randrange(1, 7))
        path = "/" + "/".join([*head, *middle])
        if rng.random() < 0.2:
            at = rng.randrange(len("/files/"), len(signed))
            path = signed[:at] + quote(chr(rng.randrange(1, 300))) + signed[at + 1 :]
        if path != signed:
            made.append(path)
    return made


def test_no_unsigned_path_is_served(scene: tuple[Api, str]) -> None:
    api, signed = scene
    assert api.get(signed, key="").content == a_picture()
    statuses: Counter[int] = Counter()
    for path in unsigned_paths(signed, 1500, seed=1):
        response = api.get(path, key="")
        if response.url.path == "/":  # the page, which is public
            continue
        statuses[response.status_code] += 1
        assert response.status_code in (404, 410), (path, response.status_code)
        assert OUTSIDE not in response.content, path
    assert statuses[404] > 1000


@pytest.mark.parametrize(
    "key",
    [
        "link/outside.png",
        "../outside.png",
        "../../outside.png",
        "a/../../outside.png",
        "../tasks.db",
    ],
)
def test_not_even_a_right_signature_opens_what_lies_outside(
    scene: tuple[Api, str], key: str
) -> None:
    """As if someone had our secret, or a key of ours came out wrong."""
    api, _ = scene
    path = api.services.signer.path(key, time.time() + 600).replace("..", "%2e%2e")
    response = api.get(path, key="")
    assert response.status_code == 404
    assert OUTSIDE not in response.content
