"""Pictures in a folder."""

import itertools
import os
import threading
import time
from pathlib import Path

import pytest

from redux_server.storage.blobs import Blobs, StorageError
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
