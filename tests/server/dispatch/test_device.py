"""Names under which workers lease tasks, and the lock of a device."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from redux_server.dispatch.device import device_lock, is_free, lock_path, worker_id
from redux_server.settings import ServerSettings


def test_a_workers_name_tells_machine_and_device_and_stays(tmp_path: Path) -> None:
    name = worker_id(tmp_path / "data", "cuda:1")
    assert name.startswith(f"{socket.gethostname()}/cuda:1/")
    assert worker_id(tmp_path / "data", "cuda:1") == name
    assert worker_id(tmp_path / "data", "cpu") != name


def test_two_machines_with_one_host_name_have_workers_of_two_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert worker_id(tmp_path / "one", "cpu") != worker_id(tmp_path / "other", "cpu")


def test_processes_that_start_together_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        names = set(pool.map(lambda _: worker_id(tmp_path / "data", "cpu"), range(32)))
    assert len(names) == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["worker-id"]


# --- The lock -------------------------------------------------------------------------------------


def test_a_devices_lock_is_free_when_its_holder_is_gone(settings: ServerSettings) -> None:
    path = lock_path(settings, "cuda:0")
    assert path.name == "worker-cuda-0.lock"
    assert is_free(path)
    with device_lock(path, before_waiting=lambda: pytest.fail("it was free")):
        assert not is_free(path)
    assert is_free(path)
