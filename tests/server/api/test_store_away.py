"""A store of pictures that is away or silent: 503 for what needs it, and nothing else waits."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from redux_server.api.services import Services
from server.in_process import INLINE, SUBMIT, URL, Api, submit

PROBES = ("/livez", "/readyz", "/metrics", "/version")


def test_a_folder_that_is_away_is_a_503_for_submits_alone_and_comes_back(
    build_api: Callable[..., Api], tmp_path: Path
) -> None:
    folder = tmp_path / "mount" / "pictures"
    api = build_api(blob_url=f"file://{folder}")
    task = submit(api, INLINE)
    probes = {path: api.get(path, key="").status_code for path in PROBES}
    folder.rename(folder.with_name("away"))
    refused = {
        "by URL": api.post(SUBMIT, json=URL),
        "inline": api.post(SUBMIT, json=INLINE),
        "upload": api.post("/api/v3/media/uploads", json={"filename": "a.png", "size": 10}),
        "form": api.post("/api/v3/upload", files={"file": b"\x89PNG\r\n\x1a\n" + bytes(90)}),
    }
    for name, answer in refused.items():
        assert answer.status_code == 503, name
        assert int(answer.headers["retry-after"]) > 0
    assert "cannot be used (No such file or directory)" in refused["by URL"].json()["message"]
    assert {path: api.get(path, key="").status_code for path in PROBES} == probes
    assert "cannot be used" in api.get("/readyz").json()["refuses_tasks"]
    assert "flux_redux_disk_free_bytes 0.0" in api.get("/metrics").text  # an alert sees it
    assert api.get(f"/api/v3/predictions/{task['id']}/result").status_code == 200
    assert not folder.exists(), "made again where a disk is to be mounted"
    folder.with_name("away").rename(folder)
    assert submit(api, INLINE)["status"] == "created"
    assert "refuses_tasks" not in api.get("/readyz").json()


class SilentBlobs:
    """A store that takes nothing until it is told to."""

    def __init__(self, blobs: Any) -> None:
        self._blobs = blobs
        self.answers = threading.Event()
        self.asked = 0

    def put(self, key: str, data: Any) -> None:
        self.asked += 1
        assert self.answers.wait(30)
        self._blobs.put(key, data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blobs, name)


@pytest.fixture
def silent(build_services: Callable[..., Services]) -> Iterator[tuple[Services, SilentBlobs]]:
    services = build_services()
    blobs = SilentBlobs(services.blobs)
    yield replace(services, blobs=blobs), blobs
    blobs.answers.set()


def test_polls_and_keys_wait_for_no_silent_store(
    silent: tuple[Services, SilentBlobs], build_api: Callable[..., Api]
) -> None:
    services, blobs = silent
    api = build_api(services)
    task, other_key = submit(api, URL), services.keys.create("other")

    async def use() -> None:
        # A pool as small as that of a machine with few cores.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        transport = httpx.ASGITransport(api.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            def send(method: str, path: str, key: str, **more: Any) -> Any:
                headers = {"Authorization": f"Bearer {key}"}
                return client.request(method, path, headers=headers, **more)

            sent = [
                asyncio.create_task(send("POST", SUBMIT, api.key, json=INLINE)) for _ in range(12)
            ]
            while blobs.asked < 12:
                await asyncio.sleep(0.01)
            async with asyncio.timeout(10):
                path = f"/api/v3/predictions/{task['id']}/result"
                assert (await send("GET", path, api.key)).status_code == 200
                assert (await send("GET", path, other_key)).status_code == 404  # looked up anew
                assert (await send("GET", "/readyz", "")).status_code == 503
                assert (await send("GET", "/metrics", "")).status_code == 200
                assert (await send("POST", SUBMIT, other_key, json=URL)).status_code == 200
            blobs.answers.set()
            assert {answer.status_code for answer in await asyncio.gather(*sent)} == {200}

    api._runner.run(asyncio.wait_for(use(), 60))
