"""Pictures in a folder."""

import asyncio
import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from redux_server.storage.blobs import MARKER, Blobs, StorageError
from redux_server.storage.disk import is_full
from server.full_disk import MIB, fill


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs")


def test_what_was_put_can_be_got(blobs: Blobs) -> None:
    blobs.put("a/1/0.png", b"one")
    blobs.put("a/1/0.png", b"two")
    assert blobs.get("a/1/0.png") == b"two"


def test_missing_blob_is_a_file_not_found(blobs: Blobs) -> None:
    with pytest.raises(FileNotFoundError):
        blobs.get("a/1/0.png")


def test_folder_is_the_owners_alone(tmp_path: Path) -> None:
    Blobs(tmp_path / "blobs")
    assert (tmp_path / "blobs").stat().st_mode & 0o077 == 0


def test_delete_under_takes_one_task_and_no_other(blobs: Blobs, tmp_path: Path) -> None:
    for key in ("a/input", "a/1/0.png", "a/2/0.png", "ab/1/0.png"):
        blobs.put(key, b"x")
    blobs.delete_under("a")
    assert blobs.get("ab/1/0.png") == b"x"
    left = [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]
    assert len(left) == 1
    blobs.delete_under("a")  # again: nothing there is no error


def test_delete_under_handles_many(blobs: Blobs) -> None:
    for number in range(120):
        blobs.put(f"a/1/{number}.png", b"x")
    blobs.delete_under("a")
    with pytest.raises(FileNotFoundError):
        blobs.get("a/1/119.png")


def test_reader_sees_all_of_a_blob_or_none(blobs: Blobs) -> None:
    versions = [bytes([letter]) * 2_000_000 for letter in b"ab"]
    blobs.put("a/1/0.png", versions[0])
    is_done = threading.Event()

    def write() -> None:
        for version in itertools.islice(itertools.cycle(versions), 20):
            blobs.put("a/1/0.png", version)
        is_done.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while not is_done.is_set():
            assert blobs.get("a/1/0.png") in versions
    finally:
        writer.join()


@pytest.mark.parametrize("key", ["../secret.txt", "a/../../secret.txt", "/etc/hostname"])
def test_key_cannot_leave_the_folder(blobs: Blobs, tmp_path: Path, key: str) -> None:
    (tmp_path / "secret.txt").write_bytes(b"secret")
    with pytest.raises(Exception) as caught:
        blobs.get(key)
    assert not isinstance(caught.value, AssertionError)


@pytest.mark.parametrize(
    "key",
    ["..", "../x", "a/../../x", "/etc/passwd", "//etc/passwd", "./../x", "a/./../../x", "a/../..",
     "%2e%2e/x", "..%2fx", "%2e%2e%2fx", "..\\x", "a\0/../../x", "\0", "a/1/0.png\0.txt",
     "a" * 5000,
     "~/../../x", "a/\u2024\u2024/x", "．．/x", "C:\\x", "file:///../../etc/passwd", "/"],
)  # fmt: skip
def test_no_key_reads_outside_the_folder(blobs: Blobs, tmp_path: Path, key: str) -> None:
    """Even with a right signature, which only we can make."""
    for name in ("x", "etc/passwd"):
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(b"outside")
    with pytest.raises((FileNotFoundError, StorageError)):
        blobs.get(key)


def test_link_out_of_the_folder_is_not_followed(blobs: Blobs, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "0.png").write_bytes(b"outside")
    (tmp_path / "blobs" / "a").symlink_to(tmp_path / "secret")
    (tmp_path / "blobs" / "b").mkdir()
    (tmp_path / "blobs" / "b" / "0.png").symlink_to(tmp_path / "secret" / "0.png")
    blobs.put("c/0.png", b"inside")
    for key in ("a/0.png", "b/0.png"):
        with pytest.raises(FileNotFoundError):
            blobs.get(key)
    assert blobs.get("c/0.png") == b"inside"


# --- What a killed process leaves -----------------------------------------------------------------


@pytest.fixture
def staged(blobs: Blobs, tmp_path: Path) -> Path:
    """What is left of a write that was cut short two hours ago."""
    path = tmp_path / "blobs" / "a" / "1" / "0.png#1"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half")
    os.utime(path, (time.time() - 7200,) * 2)
    return path


def test_obstore_writes_under_such_a_name_first(blobs: Blobs, tmp_path: Path) -> None:
    """Killed in the middle of a write, again and again, until one leaves its file."""
    data = bytes(16 * MIB)
    for number in range(60):
        child = os.fork()
        if not child:
            Blobs(tmp_path / "blobs").put(f"{number:032x}/1/0.png", data)
            os._exit(0)
        time.sleep(0.002 + 0.001 * (number % 20))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if left := [path.name for path in (tmp_path / "blobs").rglob("*") if "#" in path.name]:
            assert re.fullmatch(r"0\.png#\d+", left[0])
            return
    pytest.skip("no write could be cut short here")


def test_half_a_write_is_seen_and_deleted_with_its_task(blobs: Blobs, staged: Path) -> None:
    assert blobs.tasks_before(time.time() - 3600) == {"a"}
    blobs.put("a/2/0.png", b"x")
    assert blobs.tasks_before(time.time() - 3600) == set()
    blobs.delete_under("a")
    assert not staged.parent.parent.exists()


def test_an_empty_folder_is_as_old_as_itself(blobs: Blobs, staged: Path) -> None:
    staged.unlink()
    os.utime(staged.parent.parent, (time.time() - 7200,) * 2)
    assert blobs.tasks_before(time.time() - 3600) == {"a"}


@pytest.mark.parametrize("prefix", ["", ".", "..", "../x", "/", "/etc", "a/../.."])
def test_deleting_never_leaves_the_folder_nor_takes_all_of_it(
    blobs: Blobs, tmp_path: Path, prefix: str
) -> None:
    blobs.put("a/1/0.png", b"x")
    (tmp_path / "x").write_bytes(b"outside")
    blobs.delete_under(prefix)
    assert blobs.get("a/1/0.png") == b"x"
    assert (tmp_path / "x").exists()


def test_deleting_a_link_leaves_what_it_leads_to(blobs: Blobs, tmp_path: Path) -> None:
    (tmp_path / "blobs" / "real").mkdir()
    (tmp_path / "blobs" / "real" / "0.png").write_bytes(b"x")
    (tmp_path / "blobs" / "link").symlink_to(tmp_path / "blobs" / "real")
    blobs.delete_under("link")
    assert blobs.get("real/0.png") == b"x"


# --- A folder that is away ------------------------------------------------------------------------

USES = {
    "put": lambda blobs: blobs.put("a/1/0.png", b"x"),
    "create": lambda blobs: blobs.create("a/1/0.png", b"x"),
    "get": lambda blobs: blobs.get("a/1/0.png"),
    "open": lambda blobs: asyncio.run(blobs.open("a/1/0.png")),
    "delete_under": lambda blobs: blobs.delete_under("a"),
    "tasks_before": lambda blobs: blobs.tasks_before(time.time()),
    "check": lambda blobs: blobs.check(),
}


@pytest.mark.parametrize("empty_one_instead", [False, True], ids=["gone", "not mounted"])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_folder_that_is_away_is_no_folder_without_pictures(
    blobs: Blobs, tmp_path: Path, use: Callable[[Blobs], object], empty_one_instead: bool
) -> None:
    folder = tmp_path / "blobs"
    blobs.create(MARKER, b"mine")
    blobs.put("a/1/0.png", b"x")
    folder.rename(tmp_path / "elsewhere")
    if empty_one_instead:
        folder.mkdir()
    with pytest.raises(StorageError, match=r"away|mounted"):
        use(blobs)
    if empty_one_instead:
        assert list(folder.iterdir()) == [], "written where a disk is to be mounted"
        folder.rmdir()
    assert not folder.exists()
    (tmp_path / "elsewhere").rename(folder)
    assert blobs.get("a/1/0.png") == b"x"


# --- A full disk ----------------------------------------------------------------------------------


def test_full_disk_is_an_out_of_space_error_and_leaves_no_half_picture(small_disk: Path) -> None:
    blobs = Blobs(small_disk / "blobs")
    blobs.put("a/1/0.png", b"whole")
    fill(small_disk, leave_bytes=MIB)
    with pytest.raises(StorageError) as caught:
        blobs.put("b/1/0.png", os.urandom(3 * MIB))
    assert is_full(caught.value)
    with pytest.raises(FileNotFoundError):
        blobs.get("b/1/0.png")
    assert blobs.get("a/1/0.png") == b"whole"


def test_pictures_leave_the_last_room_to_the_database(small_disk: Path) -> None:
    blobs = Blobs(small_disk / "blobs", keep_free_bytes=4 * MIB)
    blobs.put("a/1/0.png", os.urandom(MIB))
    with pytest.raises(StorageError) as caught:
        blobs.put("b/1/0.png", os.urandom(8 * MIB))
    assert is_full(caught.value)
    assert blobs.tasks_before(time.time() + 60) == {"a"}


def test_picture_and_its_folders_are_on_the_disk_before_it_counts_as_stored(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut, what was not flushed is gone: the bytes, or the name that leads to them.

    That of the name is in its folder, whose own name is in the one above it.
    """
    synced: list[Path] = []
    sync = os.fsync

    def noting(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    root = tmp_path / "blobs"
    way = [root / "a/1/0.png", root / "a/1", root / "a", root]
    blobs.put("a/1/0.png", b"picture")
    assert synced[: len(way)] == way
    synced.clear()
    blobs.create("b/1/0.png", b"picture")
    assert [path.relative_to(root).as_posix() for path in synced] == ["b/1/0.png", "b/1", "b", "."]


def test_folder_that_others_made_becomes_the_owners_alone(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir(mode=0o755)
    (tmp_path / "blobs").chmod(0o755)
    Blobs(tmp_path / "blobs")
    assert (tmp_path / "blobs").stat().st_mode & 0o777 == 0o700
