"""Large bodies: on the disk, counted for their key, read as small ones are, and soon forgotten."""

import asyncio
import base64
import http.client
import json
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from e2e.live import LiveServer, a_picture, plain_client
from redux_server.api import bodies
from redux_server.api.bodies import SMALL_BYTES
from redux_server.api.dependencies import MAX_JSON_BYTES
from redux_server.api.services import Services
from redux_server.errors import TooManyRequests
from redux_server.storage.disk import DiskSpace
from server.in_process import SUBMIT, Api, submit

PICTURE = a_picture() + random.Random(0).randbytes(2 * 2**20)
PLAIN = base64.b64encode(PICTURE).decode()
URI = f"data:image/png;base64,{PLAIN}"


@pytest.fixture
def api(build_api: Callable[..., Api]) -> Api:
    return build_api()


def stored(api: Api, task: dict[str, Any], name: str = "input") -> bytes:
    return api.services.blobs.get(f"{task['id']}/{name}")


def files_of(folder: Path) -> list[str]:
    """What this process has open in ``folder``, by whatever name."""
    links = [os.readlink(each) for each in map(str, _descriptors())]
    return [link for link in links if link.startswith(f"{folder}/")]


def _descriptors() -> Iterator[Path]:
    for each in Path("/proc/self/fd").iterdir():
        if each.is_symlink():
            yield each


@pytest.mark.parametrize("image", [URI, PLAIN, URI.replace("image/png", "image/jpeg;name=a.png")])
def test_a_large_picture_is_stored_as_it_was_sent(api: Api, image: str) -> None:
    assert len(image) > SMALL_BYTES
    assert stored(api, submit(api, {"image": image})) == PICTURE


def test_a_data_uri_within_another_is_no_picture(api: Api) -> None:
    small = base64.b64encode(a_picture()).decode()
    for payload in (small, PLAIN):
        answer = api.post(SUBMIT, json={"image": f"data:;base64,data:;base64,{payload}"})
        assert answer.status_code == 400


@pytest.mark.parametrize("slash", ["\\/", "\\u002F"])
def test_escapes_of_serialisers_are_understood(api: Api, slash: str) -> None:
    body = json.dumps({"image": URI}).replace("/", slash).encode()
    answer = api.post(SUBMIT, content=body)
    assert stored(api, answer.json()["data"]) == PICTURE


def test_several_large_pictures_keep_their_places(api: Api) -> None:
    others = [a_picture() + random.Random(seed).randbytes(2**18) for seed in (1, 2)]
    images = [base64.b64encode(each).decode() for each in others]
    task = submit(api, {"image": URI, "images": images, "mask": PLAIN})
    assert stored(api, task) == stored(api, task, "mask") == PICTURE
    assert [stored(api, task, f"input-{n}") for n in (1, 2)] == others


def test_a_picture_that_comes_as_image_and_first_of_images_counts_once(api: Api) -> None:
    task = submit(api, {"image": URI, "images": [PLAIN]})
    with pytest.raises(FileNotFoundError):
        stored(api, task, "input-1")


def test_a_repeated_large_request_is_known_and_another_is_a_conflict(api: Api) -> None:
    headers = {"Idempotency-Key": "a"}
    first = submit(api, {"image": URI}, headers=headers)
    assert submit(api, {"image": URI}, headers=headers)["id"] == first["id"]
    other = PLAIN[:-4] + "AAAA"
    assert api.post(SUBMIT, json={"image": other}, headers=headers).status_code == 409


@pytest.mark.parametrize("text", [URI, PLAIN, "a" * 2**20, f"Note: {PLAIN}"])
@pytest.mark.parametrize("name", ["prompt", "size", "webhook_url", "quality"])
def test_a_long_text_that_is_no_picture_is_refused_by_its_name(
    api: Api, name: str, text: str
) -> None:
    answer = api.post(SUBMIT, json={"image": URI, name: text})
    assert answer.status_code == 400
    assert name.removesuffix("_url") in answer.json()["message"]
    assert "\0" not in answer.json()["message"]
    assert len(answer.text) < 2000


def test_a_long_text_in_what_is_no_parameter_is_ignored(api: Api) -> None:
    assert stored(api, submit(api, {"image": URI, "note": PLAIN, "more": [URI]})) == PICTURE


@pytest.mark.parametrize(
    "document",
    [b'{"x":[' + b"[]," * 10**6 + b"0]}", b"[" * 10**6, b'{"image": "' + b'\\"' * 10**6 + b'"}'],
    ids=["wide", "deep", "escaped"],
)
def test_a_body_that_is_large_for_something_else_is_refused(api: Api, document: bytes) -> None:
    answer = api.post(SUBMIT, content=document)
    assert answer.status_code == 413
    assert "256 KiB beside its pictures" in answer.json()["message"]


@pytest.mark.parametrize("end", [b"", b'"', b'"}}'])
def test_a_large_body_that_is_no_json_is_told_so(api: Api, end: bytes) -> None:
    answer = api.post(SUBMIT, content=b'{"image": "' + b"A" * 2**20 + end)
    assert answer.status_code == 400
    assert "not valid JSON" in answer.json()["message"]


@pytest.mark.parametrize(
    "path",
    ["/api/v3/predictions", "/api/v3/predictions/delete", "/api/v3/media/uploads"],
)
def test_where_no_picture_is_sent_bodies_are_small(api: Api, path: str) -> None:
    answer = api.post(path, content=b" " * (MAX_JSON_BYTES + 1))
    assert answer.status_code == 413
    assert "64 KiB" in answer.json()["message"]


# --- while they come ------------------------------------------------------------------------------


class Coming:
    """A request whose body comes when it is told to."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.may_end = asyncio.Event()

    async def stream(self) -> AsyncIterator[bytes]:
        for at in range(0, self.size_bytes, 2**16):
            yield bytes(min(2**16, self.size_bytes - at))
        await self.may_end.wait()


async def hold(api: Api, coming: Coming, key_id: str = "a") -> None:
    async with api.services.bodies.receive(coming, key_id):  # type: ignore[arg-type]
        pass


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0.01)


def test_an_unfinished_body_lies_on_the_disk_and_is_gone_with_its_request(api: Api) -> None:
    folder = api.services.bodies.folder

    async def scenario() -> None:
        coming = Coming(8 * 2**20)
        task = asyncio.create_task(hold(api, coming))
        await settle()
        assert api.services.bodies.held_bytes == coming.size_bytes
        assert len([each for each in files_of(folder) if "(deleted)" in each]) == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert api.services.bodies.held_bytes == 0
        assert not [each for each in files_of(folder) if "(deleted)" in each]

    asyncio.run(scenario())


def test_a_key_holds_no_more_than_it_may_and_others_their_own(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "MAX_BYTES_OF_A_KEY", 5 * 2**20)
    monkeypatch.setattr(bodies, "MAX_BYTES", 9 * 2**20)

    async def scenario() -> None:
        held = [(Coming(4 * 2**20), key) for key in ("a", "b")]
        tasks = [asyncio.create_task(hold(api, *each)) for each in held]
        await settle()
        for key in ("a", "c"):  # its own, and all together
            with pytest.raises(TooManyRequests, match="Too many large requests") as refused:
                await hold(api, Coming(2 * 2**20), key)
            assert refused.value.headers["Retry-After"]
        for coming, _ in held:
            coming.may_end.set()
        await asyncio.gather(*tasks)
        assert api.services.bodies.held_bytes == 0

    asyncio.run(scenario())


# --- meanwhile ------------------------------------------------------------------------------------

PATH_OF_OURS = b"/files/" + b"0" * 32 + b"/1/"
SHAPES = {
    "lists": (b'{"x":[', b"[],", b"0]}"),
    "numbers": (b'{"x":[', b"1.1,", b"0]}"),
    "deep": (b"", b"[", b""),
    "one number": (b'{"seed": ', b"1", b"}"),
    "parameters of a data URI": (b'{"image":"data:', b";a", b'"}'),
    "file URLs": (b'{"image":"http://x', PATH_OF_OURS, b'!"}'),
    "escaped quotes": (b'{"image":"', b'\\"', b'"}'),
    "backslashes": (b'{"image":"', b"\\\\", b'"}'),
    "escaped letters": (b'{"image":"', b"\\u0041", b'"}'),
    "line breaks": (b'{"image":"', b"\\n", b'"}'),
    "a prompt": (b'{"image":"https://e.com/a.png","prompt":"', b"a", b'"}'),
    "no picture": (b'{"image":"', b"A", b'"}'),
    "half sent": (b'{"image":"', b"A", b""),
}
"""What a body begins with, repeats and ends in."""


@pytest.mark.parametrize("size", [SMALL_BYTES - 200, 27 * 2**20], ids=["small", "large"])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_body_keeps_others_waiting(live: LiveServer, shape: str, size: int) -> None:
    """A busy machine may take its time; what is not bounded takes many seconds."""
    start, unit, end = SHAPES[shape]
    waits: list[float] = []
    is_over = threading.Event()

    def ask() -> None:
        with plain_client(timeout=60) as client:
            while not is_over.is_set():
                started = time.monotonic()
                assert client.get(f"{live.base_url}/livez").status_code == 200
                waits.append(time.monotonic() - started)
                time.sleep(0.01)

    other = threading.Thread(target=ask)
    other.start()
    try:
        status = post_raw(live, start + unit * (size // len(unit)) + end)
    finally:
        is_over.set()
        other.join()
    assert status in (400, 413)
    assert max(waits) < 1.5


def post_raw(live: LiveServer, body: bytes) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=60)
    headers = {"Authorization": f"Bearer {live.key}", "Content-Type": "application/json"}
    connection.request("POST", SUBMIT, body, headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_one_keys_bodies_leave_half_of_the_disk_to_others(
    build_services: Callable[..., Services], build_api: Callable[..., Api], tmp_path: Path
) -> None:
    services = build_services()
    disk = DiskSpace([tmp_path], floor_bytes=2**20, free=lambda _: 3 * 2**20)
    ours = bodies.Bodies(services.settings.data_dir, disk)
    api = build_api(replace(services, bodies=ours))
    answer = api.post(SUBMIT, json={"image": PLAIN})
    assert answer.status_code == 429
    assert "more than is left on it for others" in answer.json()["message"]
    assert ours.held_bytes == 0
    small = base64.b64encode(PICTURE[: 2**20]).decode()
    assert api.post(SUBMIT, json={"image": small}).status_code == 200
