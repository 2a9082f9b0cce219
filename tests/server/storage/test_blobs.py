"""Stored pictures, and the signed paths under which they are served."""

import itertools
import threading
from pathlib import Path

import pytest
from sqlalchemy import Engine

from redux_server.database.migration import open_database
from redux_server.errors import Gone, NotFound
from redux_server.storage.blobs import Blobs, StorageError
from redux_server.storage.signing import Signer, signing_secret
from server.in_process import Clock

KEY = "0123456789abcdef0123456789abcdef/1/0.png"


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs")


@pytest.fixture
def signer(clock: Clock) -> Signer:
    return Signer(b"secret", clock=clock)


# --- storage --------------------------------------------------------------------------------------


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


# --- signatures -----------------------------------------------------------------------------------


def test_signed_path_opens_its_key(signer: Signer, clock: Clock) -> None:
    path = signer.path(KEY, clock.now + 60)
    assert signer.open_key(path) == KEY
    assert path.endswith("/0.png"), "a client takes the file name from the URL"


def test_path_is_open_until_its_time_and_gone_after(signer: Signer, clock: Clock) -> None:
    path = signer.path(KEY, clock.now + 60)
    clock.now += 60
    assert signer.open_key(path) == KEY
    clock.now += 1
    with pytest.raises(Gone):
        signer.open_key(path)


def test_expired_path_is_still_known_as_ours(signer: Signer, clock: Clock) -> None:
    path = signer.path(KEY, clock.now - 60)
    assert signer.key_of(path) == KEY


def test_any_changed_character_breaks_the_signature(signer: Signer, clock: Clock) -> None:
    path = signer.path(KEY, clock.now + 60)
    for at, letter in itertools.product(range(len("/files/"), len(path)), "0f9"):
        changed = path[:at] + letter + path[at + 1 :]
        if changed != path:
            with pytest.raises(NotFound):
                signer.open_key(changed)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/files/",
        "/files/x",
        f"/files/{'0' * 32}/1/{KEY}",
        "/files/../../etc/passwd",
        f"/files/{'0' * 32}/99999999999999999999/{KEY}",
        f"/files/{'0' * 31}\n/1/{KEY}",
        "/files/\ud800",
        "//[/files",
    ],
)
def test_other_paths_are_not_found(signer: Signer, path: str) -> None:
    with pytest.raises(NotFound):
        signer.open_key(path)


def test_path_of_another_secret_is_not_ours(clock: Clock, signer: Signer) -> None:
    foreign = Signer(b"other", clock=clock).path(KEY, clock.now + 60)
    assert signer.key_of(foreign) is None


@pytest.mark.parametrize("host", ["http://localhost:8000", "https://flux.example.com", ""])
def test_our_url_is_known_whatever_host_it_came_by(signer: Signer, clock: Clock, host: str) -> None:
    assert signer.key_of(host + signer.path(KEY, clock.now + 60)) == KEY


@pytest.mark.parametrize("url", ["https://example.com/files/a/b/c", "http://[::1", "x", ""])
def test_foreign_url_is_not_ours(signer: Signer, url: str) -> None:
    assert signer.key_of(url) is None


def test_secret_is_made_once_and_survives_a_restart(database: Engine) -> None:
    first = signing_secret(database)
    again = open_database(str(database.url))
    try:
        assert signing_secret(again) == first
    finally:
        again.dispose()
    assert len(first) == 32


def test_secrets_of_two_databases_differ(database: Engine, tmp_path: Path) -> None:
    other = open_database(f"sqlite:///{tmp_path / 'other' / 'tasks.db'}")
    try:
        assert signing_secret(other) != signing_secret(database)
    finally:
        other.dispose()
