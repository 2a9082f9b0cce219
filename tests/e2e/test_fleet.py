"""Workers with different models over one PostgreSQL: each does what was accepted for its own."""

from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from e2e.cluster import Node, RemoteWorker
from e2e.live import a_picture, data_uri, free_port, plain_client, terminate, wait_until
from e2e.services import new_postgres_database
from redux_server.database.connection import connect
from redux_server.database.migration import upgrade_database

pytestmark = pytest.mark.cluster
BODY = {"image": data_uri(a_picture()), "size": "512*512", "num_inference_steps": 50}


def start(folder: Path, name: str, node: Node, model: str) -> tuple[RemoteWorker, str]:
    """A worker that is ready, and where it answers for itself."""
    port = free_port()
    flags = [*node.flags, "--metrics-port", str(port)]
    worker = RemoteWorker(folder, name, node, model=model, flags=flags)
    url = f"http://127.0.0.1:{port}"

    wait_until(lambda: _is_ready(url), 90, what=lambda: worker.log)
    return worker, url


def test_a_worker_with_another_model_leaves_tasks_to_their_own(tmp_path: Path) -> None:
    with new_postgres_database() as url:
        engine = connect(url)
        upgrade_database(engine)
        engine.dispose()
        node = Node(tmp_path, "api", "--dispatch", "sql", "--lease-s", "1", database_url=url)
        node.start(wait=False)
        workers: list[RemoteWorker] = []
        try:
            slow, asked = start(tmp_path, "slow", node, "fake-slow")
            workers.append(slow)
            with plain_client() as client:
                assert client.get(f"{asked}/livez").status_code == 200
            wait_until(lambda: _is_ready(node.base_url), 60, what=lambda: node.log)
            with plain_client() as client:
                version = client.get(f"{node.base_url}/version").json()
            assert version["model"] == "fake", "what the worker calls itself"
            mine = [node.submit(BODY)["id"] for _ in range(3)]
            slow.kill()
            other, _ = start(tmp_path, "other", node, "fake")
            workers.append(other)
            assert node.run(BODY)["status"] == "completed"
            states = {node.get(each)["status"] for each in mine}
            assert states <= {"created", "processing"}, "the other worker has left them"
            slow.start()
            assert {node.wait(each)["status"] for each in mine} == {"completed"}
            assert "worker ready" in slow.log
        finally:
            for worker in workers:
                terminate(worker.process, 20)
            node.stop()


def _is_ready(url: str) -> bool:
    with suppress(httpx.TransportError), plain_client(timeout=5) as client:
        return client.get(f"{url}/readyz").status_code == 200
    return False
