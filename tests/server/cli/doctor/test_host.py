"""What ``doctor`` says of the host: data directory, pictures, port, keys, what machines share."""

import socket
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from e2e.live import free_port
from redux_server.api.auth import KeyRing
from redux_server.cli.doctor import host
from redux_server.cli.doctor.findings import Finding, Level
from redux_server.cli.doctor.host import check_floor, check_pictures
from redux_server.database.clock import ClockGuard
from redux_server.database.migration import open_database
from redux_server.settings import ServerSettings
from redux_server.storage.blobs import MARKER, Blobs
from redux_server.storage.owner import database_id
from server.cli.doctor.findings import levels, only
from server.s3 import BUCKET, aws, s3_server

MIB = 2**20


# --- data directory -------------------------------------------------------------------------------


def test_a_data_dir_under_a_file_is_missing(settings: ServerSettings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert only(host.check_data_dir(replace(settings, data_dir=folder))).level is (
            Level.MISSING
        )


def test_a_data_dir_without_the_right_to_write_is_missing(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.os, "access", lambda *_: False)
    assert only(host.check_data_dir(settings)).level is Level.MISSING


@pytest.mark.parametrize(
    ("kind", "level"),
    [("nfs4", Level.NOTE), ("cifs", Level.NOTE), ("ext4", Level.OK), ("overlay", Level.OK)],
)
def test_network_file_systems_are_warned_of(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch, kind: str, level: Level
) -> None:
    monkeypatch.setattr(host, "filesystem_of", lambda _: kind)
    assert levels(host.check_data_dir(settings))["data dir"] is level


@pytest.mark.parametrize(
    ("free_bytes", "level"),
    [(10**6, Level.MISSING), (10**9, Level.NOTE), (10**11, Level.OK)],
)
def test_little_space_is_said(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch, free_bytes: int, level: Level
) -> None:
    usage = namedtuple("usage", "total used free")(10**12, 0, free_bytes)
    monkeypatch.setattr(host.shutil, "disk_usage", lambda _: usage)
    assert levels(host.check_data_dir(settings))["disk space"] is level


def test_the_file_system_is_that_of_the_deepest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "40 22 0:40 / /srv/my\\040data rw - nfs4 host:/x rw\n"
        "41 22 0:41 / /srv rw - xfs /dev/sdb rw\n"
    )
    for path, kind in (("/srv/my data/x", "nfs4"), ("/srv/my", "xfs"), ("/opt", "ext4")):
        assert host.filesystem_of(Path(path), mounts=mounts) == kind


@pytest.mark.parametrize(
    ("floor_mib", "free_mib", "is_missing"),
    [(512, 511, True), (512, 512, False), (0, 0, False), (100, 511, False)],
)
def test_a_disk_below_the_floor_is_missing_room(
    tmp_path: Path, floor_mib: int, free_mib: int, is_missing: bool
) -> None:
    settings = ServerSettings(data_dir=tmp_path, min_free_disk=floor_mib)
    found = [finding.level for finding in check_floor(settings, free_mib * MIB)]
    assert found == ([Level.MISSING] if is_missing else [])


# --- pictures -------------------------------------------------------------------------------------


def look(tmp_path: Path, url: str) -> list[Finding]:
    return list(check_pictures(ServerSettings(data_dir=tmp_path, blob_url=url)))


def test_usual_folder_is_no_finding_of_its_own(tmp_path: Path) -> None:
    assert look(tmp_path, "") == []


def test_other_folder_is_named_and_not_created(tmp_path: Path) -> None:
    first, *_ = look(tmp_path, f"file://{tmp_path}/pictures")
    assert (first.level, first.text) == (Level.OK, str(tmp_path / "pictures"))
    assert list(tmp_path.iterdir()) == []


def test_bucket_that_answers_is_fine_and_left_alone(tmp_path: Path) -> None:
    with s3_server() as endpoint, aws(endpoint):
        (finding,) = look(tmp_path, f"s3://{BUCKET}/x")
        assert finding.level is Level.OK
        (missing,) = look(tmp_path, "s3://no-such-bucket/x")
        assert missing.level is Level.MISSING
        assert "the bucket does not exist" in missing.text
        # Its own prefix: moto keeps what other tests of this process have put.
        listed = f"{endpoint}/{BUCKET}?list-type=2&prefix=x/"
        answer = httpx.get(listed, trust_env=False, timeout=60)
        assert "<Key>" not in answer.text


@pytest.mark.parametrize(
    ("url", "says"), [("s3://bucket/x", "does not answer"), ("ftp://bucket", "s3://bucket/prefix")]
)
def test_store_that_cannot_be_used_is_missing(tmp_path: Path, url: str, says: str) -> None:
    with aws("http://127.0.0.1:9"):
        started = time.monotonic()
        (finding,) = look(tmp_path, url)
        assert time.monotonic() - started < 5
    assert finding.level is Level.MISSING
    assert says in finding.text


# --- port and keys --------------------------------------------------------------------------------


def test_a_port_in_use_is_missing(settings: ServerSettings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        taken.settimeout(0)
        finding = only(host.check_port(replace(settings, port=port)))
    assert finding.level is Level.MISSING
    assert "choose another --port" in finding.text


def test_a_port_on_which_we_run_already_is_noted(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_is_ours", lambda _: True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        finding = only(host.check_port(replace(settings, port=taken.getsockname()[1])))
    assert finding.level is Level.NOTE


def test_keys_are_counted_without_those_revoked(settings: ServerSettings, tmp_path: Path) -> None:
    database = open_database(settings.database)
    ring = KeyRing(database)
    ring.create("a")
    ring.create("b")
    ring.revoke(ring.list()[0].id)
    database.dispose()
    (tmp_path / "keys").write_text("c:0123456789abcdef\n")
    chosen = replace(settings, api_keys_file=str(tmp_path / "keys"), host="0.0.0.0")
    assert only(host.check_api_keys(chosen)) == Finding(Level.OK, "API keys", "2 valid")


def test_without_keys_only_loopback_is_fine(settings: ServerSettings) -> None:
    assert only(host.check_api_keys(settings)).level is Level.NOTE
    assert only(host.check_api_keys(replace(settings, host="::"))).level is Level.MISSING


def test_a_keys_file_of_no_use_is_missing(settings: ServerSettings, tmp_path: Path) -> None:
    chosen = replace(settings, api_keys_file=str(tmp_path / "absent"))
    assert only(host.check_api_keys(chosen)).level is Level.MISSING


# --- several machines -----------------------------------------------------------------------------


def test_one_machine_has_nothing_to_share(settings: ServerSettings) -> None:
    assert list(host.check_cluster(settings)) == []


def test_what_several_machines_lack_is_said(settings: ServerSettings) -> None:
    url = f"postgresql://u:hunter2@127.0.0.1:{free_port()}/db"
    given = replace(settings, database_url=url, dispatch="celery")
    database, dispatch = host.check_cluster(given)
    assert (database.level, database.subject) == (Level.MISSING, "database")
    assert "check --database-url" in database.text
    assert (dispatch.level, dispatch.subject) == (Level.MISSING, "dispatch")
    assert "needs --broker-url" in dispatch.text
    assert "hunter2" not in database.text
    assert only(host.check_api_keys(given)).text == "cannot be counted: see the database"


@pytest.mark.cluster
def test_a_database_of_several_machines_is_named(
    settings: ServerSettings, postgres_url: str
) -> None:
    found = only(host.check_cluster(replace(settings, database_url=postgres_url)))
    assert (found.level, found.subject) == (Level.OK, "database")
    assert found.text.startswith("postgresql+psycopg://")


@pytest.mark.parametrize(("gap", "level"), [("", Level.OK), ("the kernel has none", Level.NOTE)])
def test_confinement_of_decoders_is_told(
    gap: str, level: Level, settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "confinement_gap", lambda: gap)
    found = only(host.check_confinement(settings))
    assert found.level is level and found.subject == "decoding" and gap in found.text


# --- What is old ----------------------------------------------------------------------------------


def test_nothing_is_said_of_sweeps_that_would_delete_what_is_old(
    settings: ServerSettings, tmp_path: Path
) -> None:
    assert list(host.check_sweeps(settings)) == []
    assert list(tmp_path.iterdir()) == [], "made something"
    database = open_database(settings.database)
    assert ClockGuard(database, clock=time.time).believes()
    Blobs(settings.blobs_dir).create(MARKER, database_id(database).encode())
    database.dispose()
    assert list(host.check_sweeps(settings)) == []


def test_a_date_that_has_jumped_is_noted(settings: ServerSettings) -> None:
    database = open_database(settings.database)
    assert ClockGuard(database, clock=lambda: time.time() - 3 * 86400).believes()
    database.dispose()
    finding = only(host.check_sweeps(settings))
    assert (finding.level, finding.subject) == (Level.NOTE, "date")
    assert "off by 3.0 days" in finding.text


def test_pictures_of_another_database_are_noted_with_what_to_do(settings: ServerSettings) -> None:
    database = open_database(settings.database)
    own_id = database_id(database)
    database.dispose()
    Blobs(settings.blobs_dir).create(MARKER, b"f" * 32)
    finding = only(host.check_sweeps(settings))
    assert (finding.level, finding.subject) == (Level.NOTE, "pictures")
    assert f"write {own_id} into {MARKER}" in finding.text
    Blobs(settings.blobs_dir).put(MARKER, own_id.encode())
    assert list(host.check_sweeps(settings)) == []
