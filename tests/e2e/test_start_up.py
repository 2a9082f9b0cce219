"""A server whose model cannot be loaded says so, and goes on answering."""

from pathlib import Path

import httpx
import pytest
import torch

from e2e.live import LiveServer, wait_until


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device that must be missing")
def test_a_model_that_cannot_be_loaded_is_said_by_readyz(tmp_path: Path) -> None:
    server = LiveServer(tmp_path / "data", "--device", "cuda", model="tiny")
    server.start(wait=False)
    try:
        seen: list[str] = []

        def has_failed() -> bool:
            try:
                response = httpx.get(f"{server.base_url}/readyz", timeout=5)
            except httpx.TransportError:
                return False
            assert response.status_code == 503
            seen[:] = [worker["detail"] for worker in response.json()["workers"]]
            return any(w["state"] == "failed" for w in response.json()["workers"])

        wait_until(has_failed, 60, what=lambda: server.log)
        assert "sees no CUDA device" in seen[0]
        assert httpx.get(f"{server.base_url}/livez", timeout=5).status_code == 200
    finally:
        server.stop()
