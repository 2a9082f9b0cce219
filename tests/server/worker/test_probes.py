"""What a worker on its own answers about itself."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from redux_server.worker import probes as module
from redux_server.worker.probes import WorkerProbes, serve


@pytest.fixture
def probes() -> WorkerProbes:
    return WorkerProbes()


@pytest.fixture
def url(probes: WorkerProbes) -> Iterator[str]:
    server = serve("127.0.0.1", 0, probes)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def get(url: str) -> tuple[int, dict[str, Any]]:
    answer = httpx.get(url, trust_env=False)
    return answer.status_code, answer.json()


def test_a_worker_is_alive_while_it_loads_and_ready_afterwards(
    probes: WorkerProbes, url: str
) -> None:
    assert get(f"{url}/livez") == get(f"{url}/health") == (200, {"status": "ok"})
    status, body = get(f"{url}/readyz")
    assert (status, body["reason"]) == (503, "the worker is loading")
    probes.state, probes.detail = "ready", "mini"
    assert get(f"{url}/readyz") == (
        200,
        {"status": "ready", "state": "ready", "detail": "mini"},
    )
    probes.obstacle = lambda: "the database does not answer"
    status, body = get(f"{url}/readyz?x")
    assert (status, body["status"], body["reason"]) == (
        503,
        "not ready",
        "the database does not answer",
    )
    assert get(f"{url}/livez")[0] == 200


def test_a_worker_whose_threads_ended_is_not_alive(probes: WorkerProbes, url: str) -> None:
    probes.state, probes.is_alive = "ready", lambda: False
    assert get(f"{url}/livez")[0] == 503
    assert get(f"{url}/readyz")[0] == 503


def test_its_metrics_are_there_and_nothing_else(url: str) -> None:
    assert "flux_redux_" in httpx.get(f"{url}/metrics", trust_env=False).text
    assert get(f"{url}/api/v3/models")[0] == 404


def test_who_connects_and_says_nothing_is_let_go(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(module, "_PATIENCE_S", 0.2)
    server = serve("127.0.0.1", 0, WorkerProbes())
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as silent:
        assert silent.recv(1) == b""
    server.shutdown()
    server.server_close()
