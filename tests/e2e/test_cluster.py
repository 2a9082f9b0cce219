"""Two API nodes and three workers over PostgreSQL, with a broker that loses everything, and deaths.

What clients see is judged by the same checker as on one machine (tests/e2e/history.py). The
services that are killed are our own (tests/chaos/services.py).
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from sqlalchemy import make_url

from chaos.clients import Habits
from chaos.faults import Fault
from chaos.run import scenario
from chaos.services import Missing
from chaos.storm import Goal, Scenario, Storm
from e2e.cluster import Node
from e2e.live import a_picture, data_uri, plain_client, wait_until
from e2e.proxy import Proxy
from e2e.services import new_postgres_database
from redux_server.database.connection import connect
from redux_server.database.migration import upgrade_database

pytestmark = pytest.mark.cluster
pytest.importorskip("celery", reason="celery is not installed (pip install '.[cluster]')")
IMAGE = data_uri(a_picture())
QUICK = Habits(most_open=10, refused_webhooks=0.0)


@contextmanager
def cluster(engine: str, seed: int) -> Iterator[Scenario]:
    try:
        with scenario(engine, seed) as running:
            yield running
    except Missing as reason:
        pytest.skip(str(reason))


def _kills(running: Scenario) -> list[Fault]:
    return [fault for fault in running.faults() if fault.kills or fault.name.startswith("queue")]


@pytest.mark.parametrize(
    ("engine", "tasks", "strikes"),
    [
        ("celery", 100, 5),
        ("sql", 40, 2),
        pytest.param("celery", 300, 10, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_lost_or_done_twice_whatever_dies_and_whatever_the_queue_forgets(
    engine: str, tasks: int, strikes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = random.SystemRandom().randrange(2**16)
    with cluster(engine, seed) as running:
        storm = Storm(running, _kills(running), seed, habits=QUICK)
        found = storm.run(Goal(tasks=tasks, strikes=strikes))
        owners = {row.owner for row in running.rows().values() if row.owner}
        log = running.log
    with capsys.disabled():
        print(f"\n{found.report()}")
    assert found.is_good, log
    assert (found.accepted >= tasks, sum(found.strikes.values())) == (True, strikes)
    assert len(owners) >= 2


def test_a_node_outlives_its_database_and_is_back_with_it(tmp_path: Path) -> None:
    """One server with a worker of its own can use PostgreSQL, too."""
    with new_postgres_database() as url:
        engine = connect(url)
        upgrade_database(engine)
        engine.dispose()
        place = make_url(url)
        with Proxy((place.host or "", place.port or 5432)) as proxy:
            near = place.set(host="127.0.0.1", port=proxy.port)
            near_url = near.render_as_string(hide_password=False)
            node = Node(tmp_path, "api", "--dispatch", "local", database_url=near_url)
            node._url = url
            with node:
                body = {"image": IMAGE, "size": "512*512", "num_inference_steps": 1}
                assert node.run(body)["status"] == "completed"
                for take_away in (proxy.cut, proxy.hold):
                    take_away()
                    assert _answer(node, "/readyz", 503) < 8  # 5 on an idle machine
                    assert _answer(node, "/livez", 200) < 3
                    assert _answer(node, "/metrics", 200) < 8
                    proxy.mend()
                    began = time.monotonic()
                    wait_until(lambda: _is_ready(node), 30, what=lambda: node.log[-4000:])
                    assert time.monotonic() - began < 10
                assert node.run(body)["status"] == "completed"
        assert node.database_url.split("://")[1] not in node.log


def _answer(node: Node, path: str, status: int) -> float:
    """How long ``node`` took to answer so."""
    began = time.monotonic()
    with plain_client() as client:
        assert client.get(node.base_url + path).status_code == status
    return time.monotonic() - began


def _is_ready(node: Node) -> bool:
    with suppress(httpx.TransportError), plain_client(timeout=5) as client:
        return client.get(f"{node.base_url}/readyz").status_code == 200
    return False
