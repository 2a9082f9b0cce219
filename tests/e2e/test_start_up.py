"""A server whose model cannot be loaded ends and says why, or answers so until it can."""

import re
from pathlib import Path

import pytest
import torch

from e2e.live import LiveServer, plain_client, terminate
from server.in_process import SUBMIT, URL

EXIT_USAGE = 2


def ended(server: LiveServer) -> tuple[int, str]:
    """The exit code of a server that ends by itself, and what it said that is no log line."""
    server.start(wait=False)
    try:
        code = server.process.wait(90)
    finally:
        terminate(server.process, 10)
    said = [line for line in server.log.splitlines() if line.startswith("flux-redux: ")]
    assert "Traceback" not in server.log
    return code, "\n".join(said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device that must be missing")
def test_a_device_that_is_missing_ends_the_server(tmp_path: Path) -> None:
    code, said = ended(LiveServer(tmp_path / "data", "--device", "cuda", model="tiny"))
    assert code == EXIT_USAGE
    assert "the model cannot be loaded: device='cuda', but torch sees no CUDA device" in said
    assert said.count("\n") == 0


def test_a_folder_that_is_missing_ends_the_server_before_it_starts(tmp_path: Path) -> None:
    server = LiveServer(tmp_path / "data", "--base", str(tmp_path / "weigths"))
    code, said = ended(server)
    assert (code, said.count("\n")) == (EXIT_USAGE, 0)
    assert f"--base {tmp_path}/weigths is no folder here" in said
    assert "starts on" not in server.log


def test_a_model_that_was_not_downloaded_ends_an_offline_server(tmp_path: Path) -> None:
    server = LiveServer(tmp_path / "data", model="flux-dev", env={"HF_HOME": str(tmp_path)})
    code, said = ended(server)
    assert (code, said.count("\n")) == (EXIT_USAGE, 0)
    assert "cannot get black-forest-labs/FLUX.1-dev" in said and "HF_HUB_OFFLINE is set" in said


def test_submits_are_refused_while_the_hub_cannot_be_reached(tmp_path: Path) -> None:
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    env = {"HF_HOME": str(tmp_path), **nowhere}
    server = LiveServer(tmp_path / "data", model="flux-dev", env=env)
    server.start(wait=False)
    try:
        server.log_with("the model cannot be loaded", timeout_s=90)
        with server.client() as client:
            refused = client.post(SUBMIT, json=URL)
            assert refused.status_code == 503, refused.text
            assert "No worker can load its model" in refused.text
            assert "the hub cannot be reached" in refused.text
            assert client.get("/livez").status_code == 200
        with plain_client() as client:
            readiness = client.get(f"{server.base_url}/readyz")
        assert readiness.status_code == 503
        assert "the hub cannot be reached" in readiness.json()["workers"][0]["detail"]
        assert "Traceback" not in server.log
    finally:
        server.stop()
    assert re.search("Ready: ", server.log) is None
