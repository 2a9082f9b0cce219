"""What the worker process asks of the pipeline."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from e2e.live import free_port
from redux_pipelines.fake import FakePipeline
from redux_pipelines.loading import load as load_module
from redux_server.settings import ServerSettings, UsageError
from redux_server.worker import main, model


def test_the_memory_mode_and_the_batch_size_reach_the_pipeline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def load(**options: Any) -> FakePipeline:
        asked.update(options)
        return FakePipeline()

    monkeypatch.setattr(load_module, "load_pipeline", load)
    settings = ServerSettings(data_dir=tmp_path, memory="evict", max_batch_size=3)
    model._load(settings, "cuda:1")
    assert (asked["memory"], asked["max_batch_size"], asked["device"]) == ("evict", 3, "cuda:1")


def test_metrics_of_a_worker_can_be_scraped(tmp_path: Path) -> None:
    settings = ServerSettings(data_dir=tmp_path, metrics_port=free_port())
    main._show_metrics(settings)
    text = httpx.get(f"http://127.0.0.1:{settings.metrics_port}/metrics", trust_env=False).text
    assert "flux_redux_tickets_total" in text
    with pytest.raises(UsageError, match="choose another --metrics-port"):
        main._show_metrics(settings)
