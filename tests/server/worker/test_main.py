"""What the worker process asks of the pipeline, and what it says when it cannot have one."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from e2e.live import free_port
from redux_pipelines.errors import (
    AttentionError,
    DeviceError,
    DeviceMemoryError,
    MemoryPlanError,
    WeightsAway,
    WeightsError,
)
from redux_server.database.migration import open_database
from redux_server.dispatch.presence import (
    EXIT_CANNOT_LOAD,
    EXIT_NOT_YET,
    Presence,
    WorkerState,
)
from redux_server.settings import ServerSettings, UsageError
from redux_server.storage.blobs import StorageError
from redux_server.worker import main
from redux_server.worker.probes import WorkerProbes


def test_a_worker_can_be_asked_on_its_own_port(tmp_path: Path) -> None:
    settings = ServerSettings(data_dir=tmp_path, metrics_port=free_port())
    main._answer_probes(settings, WorkerProbes())
    url = f"http://127.0.0.1:{settings.metrics_port}"
    assert "flux_redux_tickets_total" in httpx.get(f"{url}/metrics", trust_env=False).text
    assert httpx.get(f"{url}/livez", trust_env=False).status_code == 200
    assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 503
    with pytest.raises(UsageError, match="choose another --metrics-port"):
        main._answer_probes(settings, WorkerProbes())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WeightsError("no such folder"), EXIT_CANNOT_LOAD),
        (ValueError("torch sees no CUDA device"), EXIT_CANNOT_LOAD),
        (AttentionError("flash4 needs Blackwell"), EXIT_CANNOT_LOAD),
        (MemoryPlanError("too small"), EXIT_CANNOT_LOAD),
        (WeightsAway("the hub cannot be reached"), EXIT_NOT_YET),
        (StorageError("the bucket does not answer"), EXIT_NOT_YET),
        (DeviceError("the device failed"), EXIT_NOT_YET),
        (DeviceMemoryError("no memory"), EXIT_NOT_YET),
        (RuntimeError("whatever"), EXIT_NOT_YET),
    ],
)
def test_the_exit_code_says_whether_another_try_may_succeed(
    error: Exception, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(main, "load_model", load)
    settings = ServerSettings(data_dir=tmp_path, device="cpu", model="fake", min_free_disk=0)
    assert main.run_worker(settings, device="cpu", is_supervised=False) == code
    database = open_database(settings.database)
    (found,) = Presence(database).all()
    database.dispose()
    assert found.state is WorkerState.FAILED
    assert str(error) in found.detail or "RuntimeError while loading" in found.detail
