"""Who may read what is kept: the owner alone, whoever made it and with whatever mode."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.live import LiveServer, a_picture, data_uri
from redux_server import private_files
from redux_server.api.auth import KeyRing
from redux_server.cli.doctor.host import check_data_dir
from redux_server.database.migration import open_database
from redux_server.dispatch.device import worker_id
from redux_server.private_files import private_file, private_folder
from redux_server.settings import ServerSettings
from redux_server.storage.blobs import Blobs


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def _usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_folder_that_is_made_or_there_is_the_owners_alone(tmp_path: Path) -> None:
    private_folder(tmp_path / "a" / "b")
    assert mode(tmp_path / "a" / "b") == 0o700
    for given in (0o755, 0o777, 0o711, 0o500):
        (tmp_path / "a").chmod(given)
        private_folder(tmp_path / "a")
        assert mode(tmp_path / "a") == given & 0o700


def test_file_that_is_made_or_there_is_the_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    private_file(path)
    assert mode(path) == 0o600
    path.write_text("kept")
    path.chmod(0o664)
    private_file(path)
    assert (mode(path), path.read_text()) == (0o600, "kept")


def test_folders_that_belong_to_all_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sticky, home = tmp_path / "tmp", tmp_path / "home"
    for folder, given in ((sticky, 0o1777), (home, 0o755)):
        folder.mkdir()
        folder.chmod(given)
    monkeypatch.setenv("HOME", str(home))
    private_folder(sticky)
    private_folder(home)
    assert (mode(sticky), mode(home)) == (0o1777, 0o755)


def test_folder_of_somebody_else_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, mode: int) -> None:
        raise PermissionError(1, "not yours", str(path))

    tmp_path.chmod(0o755)
    monkeypatch.setattr(private_files.Path, "chmod", refused)
    private_folder(tmp_path)
    assert mode(tmp_path) == 0o755


def test_database_of_a_folder_that_others_made_is_closed_with_its_log(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    database = open_database(f"sqlite:///{tmp_path / 'tasks.db'}")
    KeyRing(database).create("me")
    found = {path.name: mode(path) for path in tmp_path.glob("tasks.db*")}
    assert found.keys() >= {"tasks.db", "tasks.db-wal", "tasks.db-shm"}
    assert set(found.values()) == {0o600}
    for path in tmp_path.glob("tasks.db*"):
        path.chmod(0o644)  # as an older version left them
    open_database(f"sqlite:///{tmp_path / 'tasks.db'}").dispose()
    assert {mode(path) for path in tmp_path.glob("tasks.db*")} == {0o600}
    database.dispose()


def test_pictures_of_a_folder_that_others_made_are_closed(tmp_path: Path) -> None:
    folder = tmp_path / "blobs"
    folder.mkdir(mode=0o755)
    Blobs(folder).put("a/1/0.png", b"x")
    assert mode(folder) == 0o700, "whatever is below it"


def test_folder_that_a_worker_finds_is_closed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o755)
    worker_id(tmp_path / "data", "cpu")
    assert mode(tmp_path / "data") == 0o700


def test_new_files_of_a_process_and_its_children_are_private(tmp_path: Path) -> None:
    code = """
import subprocess
from redux_server.private_files import make_new_files_private
make_new_files_private()
open("a", "w").close()
subprocess.run(["touch", "b"])
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert mode(tmp_path / "a") == mode(tmp_path / "b") == 0o600


def test_nothing_that_a_server_keeps_is_open_to_others(tmp_path: Path) -> None:
    """With pictures, uploads, locks, ballast and metrics, in a folder with the usual mode."""
    data = tmp_path / "data"
    data.mkdir(mode=0o755)
    with LiveServer(data, model="fake") as server:
        with server.client() as client:
            uploaded = client.post("/api/v3/media/upload/binary", files={"file": a_picture()})
            assert uploaded.status_code == 200
        assert server.run({"image": data_uri(a_picture())})["status"] == "completed"
        kept = [data, *data.rglob("*")]
        opened = [path for path in kept if mode(path) & 0o077 and not path.is_socket()]
        assert opened == [] and len([path for path in kept if path.is_file()]) > 5


def test_doctor_tells_of_a_folder_that_is_open(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    texts = [found.text for found in check_data_dir(ServerSettings(data_dir=tmp_path))]
    assert any("others may look into it" in text for text in texts)
    tmp_path.chmod(0o700)
    texts = [found.text for found in check_data_dir(ServerSettings(data_dir=tmp_path))]
    assert not any("others" in text for text in texts)
