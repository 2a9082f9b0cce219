"""One live server with the embedded model, and for each client one user of it."""

from collections.abc import Callable, Iterator

import pytest

from clients import report
from clients.trial import Client, Reference, Trial
from e2e.live import LiveServer


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--compatibility-report",
        metavar="FILE",
        help="write what came of the clients into the table of this Markdown file",
    )


def pytest_configure(config: pytest.Config) -> None:
    if place := config.getoption("--compatibility-report", None):
        config.pluginmanager.register(report.Recorder(place))


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A live server with the embedded model; it may fetch from this machine."""
    data_dir = tmp_path_factory.mktemp("clients") / "data"
    with LiveServer(data_dir, "--fetch-allow", "127.0.0.1:*", model="mini") as server:
        yield server


@pytest.fixture(scope="session")
def reference(live: LiveServer) -> Reference:
    return Reference(live)


@pytest.fixture(scope="session")
def users() -> dict[str, Trial]:
    return {}


@pytest.fixture
def trial(
    request: pytest.FixtureRequest,
    users: dict[str, Trial],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Client, str], Trial]:
    """Begin a test of ``case`` with a client; noted for the report before anything is skipped."""

    def begin(client: Client, case: str) -> Trial:
        noted = report.Exercised(client.title, client.version, case)
        request.node.user_properties.append((report.PROPERTY, noted))
        name = f"{client.title} {client.version}"
        if name not in users:
            live, site = request.getfixturevalue("live"), request.getfixturevalue("site")
            home = tmp_path_factory.mktemp(client.pins)
            reference = request.getfixturevalue("reference")
            users[name] = Trial(client, live, site, home, reference)
        return users[name]

    return begin
