"""One live server with the embedded model, and for each client one user of it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clients import report
from clients.environments import checkout, version_of
from clients.takeover import Takeover, make_certificates, nginx
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
    """A live server with the embedded model; it may fetch from this machine and call it."""
    data_dir = tmp_path_factory.mktemp("clients") / "data"
    here = ("--fetch-allow", "127.0.0.1:*", "--webhook-allow", "127.0.0.1:*")
    with LiveServer(data_dir, *here, model="mini") as server:
        yield server


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def proxy(
    live: LiveServer, certificates: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Takeover]:
    """nginx before the live server, for clients that know only the hosted service's names."""
    folder = tmp_path_factory.mktemp("proxy") / "nginx"
    with nginx(folder, certificates, live.port) as running:
        yield running


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
            source = checkout(client.checkout) if client.checkout else ""
            if source and (found := version_of(source)) not in ("", client.version):
                pytest.fail(f"{client.checkout} is {found}; the table speaks of {client.version}")
            live, site = request.getfixturevalue("live"), request.getfixturevalue("site")
            home = tmp_path_factory.mktemp(client.pins or client.checkout)
            reference = request.getfixturevalue("reference")
            users[name] = Trial(client, live, site, home, reference, source)
            if client.has_fixed_host:
                users[name].proxy = request.getfixturevalue("proxy")
        return users[name]

    return begin
