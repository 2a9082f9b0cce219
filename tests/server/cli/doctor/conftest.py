"""A machine for the doctor: nothing of Hugging Face's on it, no network, and the fake model."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from redux_server.settings import ServerSettings


@pytest.fixture
def settings(tmp_path: Path) -> ServerSettings:
    return ServerSettings(model="fake", data_dir=tmp_path / "data", port=0, device="cpu")


@pytest.fixture(autouse=True)
def empty_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing in the cache, no token, and no way to the network."""

    def nothing(source: str, **options: object) -> str:
        assert options["local_files_only"], "doctor downloads nothing"
        raise LocalEntryNotFoundError(source)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
