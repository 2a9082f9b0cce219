"""Settings of a server whose folder is a temporary one."""

from pathlib import Path

import pytest

from redux_server.settings import ServerSettings


@pytest.fixture
def settings(tmp_path: Path) -> ServerSettings:
    return ServerSettings(data_dir=tmp_path, device="cpu", drain_timeout_s=20.0, max_attempts=2)
