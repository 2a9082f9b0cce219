"""One live server with the tiny random-weight FLUX."""

from collections.abc import Iterator

import pytest

from e2e.live import LiveServer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A live server with the real pipeline over random weights; it may fetch from this machine."""
    data_dir = tmp_path_factory.mktemp("tiny") / "data"
    with LiveServer(data_dir, "--fetch-allow", "127.0.0.1:*", model="tiny") as server:
        server.log_with("Ctrl-C")  # its first key is made, and shown, before a test makes another
        yield server
