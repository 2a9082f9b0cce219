"""What the doctor says of the store of pictures and of the floor for free space."""

import time
from pathlib import Path

import httpx
import pytest

from redux_server.cli.doctor.findings import Finding, Level
from redux_server.cli.doctor.host import check_floor, check_pictures
from redux_server.settings import ServerSettings
from server.s3 import BUCKET, aws, s3_server

MIB = 2**20


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
