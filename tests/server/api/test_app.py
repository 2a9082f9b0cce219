"""The app as a whole: what it says of errors, what it logs and loads, how it starts and ends."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from e2e.live import LiveServer, plain_client
from redux_server.api.services import Services
from server.in_process import INLINE, SUBMIT, Api, dispatch_of, submit


def test_unexpected_error_is_answered_without_its_text(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a private path")

    monkeypatch.setattr("redux_server.storage.blobs.Blobs.put", broken)
    response = api.post(SUBMIT, json=INLINE)
    assert response.status_code == 500
    body = response.json()
    assert (body["code"], body["data"], body["error_code"]) == (500, None, "internal_error")
    assert "private" not in response.text
    assert submit(api)["status"] == "created", "did not live on"


def test_wrong_method_on_an_unknown_path_is_an_unknown_path(api: Api) -> None:
    for method in ("GET", "PUT", "DELETE"):
        response = api.request(method, "/api/v3/nothing")
        assert (response.status_code, response.json()["code"]) == (404, 404)
        assert "allow" not in response.headers


@pytest.mark.parametrize("path", ["/docs/", "/livez/", "/api/v3/wavespeed-ai/flux-pro-redux/"])
def test_slash_too_many_redirects_nowhere(api: Api, path: str) -> None:
    response = api.get(path, headers={"Host": "evil.example"})
    assert response.status_code in (404, 405)
    assert "evil" not in response.text and "location" not in response.headers


def test_lifespan_starts_and_stops_the_dispatch(build_services: Callable[..., Services]) -> None:
    api = Api(build_services())
    assert dispatch_of(api).is_started and not dispatch_of(api).is_stopped
    api.close()
    assert dispatch_of(api).is_stopped


def test_log_of_the_server_holds_no_key_no_prompt_and_no_picture(live: LiveServer) -> None:
    body = {**INLINE, "size": "512*512", "num_inference_steps": 1, "prompt": "a private wish"}
    assert live.run(body)["status"] == "completed"
    log = live.log_with("task ended")
    assert live.key not in log
    assert "private wish" not in log
    assert INLINE["image"][30:60] not in log


@pytest.mark.parametrize(
    "modules", ["redux_server.api.app, redux_server.cli.serve", "redux_server.cli.main"]
)
def test_api_process_loads_no_torch(modules: str) -> None:
    code = f"import {modules}, sys; print([m for m in sys.modules if m.split('.')[0] in HEAVY])"
    heavy = "HEAVY = {'torch', 'diffusers', 'transformers', 'onnxruntime', 'triton'}; "
    done = subprocess.run(
        [sys.executable, "-c", heavy + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_server_ends_cleanly_on_sigterm(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    places = {name: str(temporary) for name in ("TMPDIR", "HOME", "XDG_CACHE_HOME")}
    with LiveServer(tmp_path / "data", env=places) as server:
        worker_pids = server.worker_pids()
        assert len(worker_pids) == 1
        assert server.stop() == 0
    assert not list(temporary.iterdir()), "left something in the temporary folder"
    assert "Traceback" not in server.log, server.log
    with pytest.raises(httpx.ConnectError), plain_client() as client:
        client.get(f"{server.base_url}/livez")
