"""What the worker asks of the pipeline."""

from pathlib import Path
from typing import Any

import pytest

from redux_pipelines.fake import FakePipeline
from redux_pipelines.loading import load as load_module
from redux_server.settings import ServerSettings
from redux_server.worker import model


def test_the_memory_mode_and_the_batch_size_reach_the_pipeline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def load(**options: Any) -> FakePipeline:
        asked.update(options)
        return FakePipeline()

    monkeypatch.setattr(load_module, "load_pipeline", load)
    settings = ServerSettings(data_dir=tmp_path, memory="evict", max_batch_size=3)
    model.load_model(settings, "cuda:1")
    assert (asked["memory"], asked["max_batch_size"], asked["device"]) == ("evict", 3, "cuda:1")
