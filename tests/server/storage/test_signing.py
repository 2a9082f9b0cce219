"""Signed paths: who may fetch which blob, and until when."""

import itertools
from pathlib import Path

import pytest
from sqlalchemy import Engine

from redux_server.database.migration import open_database
from redux_server.errors import Gone, NotFound
from redux_server.storage.signing import Signer, signing_secret
from server.in_process import Clock

KEY = "0123456789abcdef0123456789abcdef/1/0.png"


@pytest.fixture
def signer(clock: Clock) -> Signer:
    return Signer(b"secret", clock=clock)


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
