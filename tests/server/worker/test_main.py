"""What the worker process asks of the pipeline."""

from pathlib import Path

import httpx
import pytest

from e2e.live import free_port
from redux_server.settings import ServerSettings, UsageError
from redux_server.worker import main


def test_metrics_of_a_worker_can_be_scraped(tmp_path: Path) -> None:
    settings = ServerSettings(data_dir=tmp_path, metrics_port=free_port())
    main._show_metrics(settings)
    text = httpx.get(f"http://127.0.0.1:{settings.metrics_port}/metrics", trust_env=False).text
    assert "flux_redux_tickets_total" in text
    with pytest.raises(UsageError, match="choose another --metrics-port"):
        main._show_metrics(settings)
