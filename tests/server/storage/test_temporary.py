"""What is temporary lies in the data directory: files without names, a folder for each process."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from redux_server.storage.temporary import check_room, nameless_file
from server.full_disk import MIB, fill

PROCESS = """
import os, sys, tempfile
from pathlib import Path
from redux_server.storage.temporary import remake_temporary_folder, use_temporary_folder
use_temporary_folder(Path(sys.argv[1]))
child = os.popen("printenv TMPDIR").read().strip()
assert child == tempfile.gettempdir() == os.environ["TMPDIR"]
print(child, flush=True)
for line in sys.stdin:
    remake_temporary_folder()
    print(os.path.isdir(child), flush=True)
"""


@contextmanager
def using(folder: Path) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """A process that keeps in ``folder`` what is temporary, and its own folder there."""
    command = [sys.executable, "-c", PROCESS, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        own = process.stdout.readline().strip()
        assert own
        yield process, Path(own)


def answer(process: "subprocess.Popen[str]") -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_a_file_has_no_name_and_no_buffer(tmp_path: Path) -> None:
    with nameless_file(tmp_path) as file:
        file.write(b"now")
        assert os.pread(file.fileno(), 9, 0) == b"now"
        assert os.fstat(file.fileno()).st_dev == tmp_path.stat().st_dev
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_lost_is_made_again_for_its_owner_alone(tmp_path: Path) -> None:
    with nameless_file(tmp_path / "tmp"):
        assert (tmp_path / "tmp").stat().st_mode & 0o777 == 0o700


def test_a_data_directory_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):  # its disk is not mounted, most likely
        nameless_file(tmp_path / "mounts" / "data" / "tmp")
    assert list(tmp_path.iterdir()) == []


def test_room_is_looked_for_and_given_back(small_disk: Path) -> None:
    check_room(small_disk / "tmp", 6 * MIB)
    check_room(small_disk / "tmp", 6 * MIB)
    fill(small_disk, leave_bytes=4 * MIB)
    with pytest.raises(OSError) as caught:
        check_room(small_disk / "tmp", 6 * MIB)
    assert caught.value.errno == errno.ENOSPC


def test_each_process_has_a_folder_which_its_children_know(tmp_path: Path) -> None:
    place = tmp_path / "data" / "tmp"
    with using(place) as (_, one), using(place) as (_, other):
        assert one != other
        assert one.parent == other.parent == place
        assert one.stat().st_mode & 0o777 == 0o700
        assert one.is_dir(), "swept while its process lives"


def test_what_a_killed_process_left_is_swept_at_the_next_start(tmp_path: Path) -> None:
    with using(tmp_path) as (process, own):
        (own / "deep").mkdir()
        (own / "deep" / "spool").write_bytes(b"x")
        process.send_signal(signal.SIGKILL)
        process.wait()
    (tmp_path / "stray-file").write_bytes(b"x")
    (tmp_path / "stray-folder").mkdir()
    assert entries(tmp_path) == {own.name, "stray-file", "stray-folder"}
    with using(tmp_path) as (_, next_own):
        assert entries(tmp_path) == {next_own.name}


def test_a_link_is_deleted_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_bytes(b"x")
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "link").symlink_to(tmp_path / "elsewhere")
    with using(tmp_path / "tmp") as (_, own):
        assert entries(tmp_path / "tmp") == {own.name}
        assert (tmp_path / "elsewhere" / "file").exists()


def test_a_process_whose_folder_is_lost_makes_it_again_and_keeps_it(tmp_path: Path) -> None:
    place = tmp_path / "tmp"
    with using(place) as (process, own):
        subprocess.run(["rm", "-r", str(place)], check=True)
        assert answer(process) == "True"
        with using(place) as (_, other):
            assert entries(place) == {own.name, other.name}
