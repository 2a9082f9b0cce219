"""What --blob-url means."""

from pathlib import Path

import pytest

from redux_server.storage.blobs import Blobs
from redux_server.storage.buckets import BlobUrlError
from redux_server.storage.opening import local_folder, open_blobs


@pytest.mark.parametrize(
    ("url", "folder"),
    [
        ("", "/default"),
        ("file:///srv/pictures", "/srv/pictures"),
        ("file://localhost/srv/my%20pictures", "/srv/my pictures"),
        ("s3://bucket", None),
        ("s3://bucket/deep/prefix", None),
        ("gs://bucket/prefix", None),
        ("az://container", None),
    ],
)
def test_blob_url_names_a_folder_or_a_bucket(url: str, folder: str | None) -> None:
    assert local_folder(url, Path("/default")) == (folder and Path(folder))


@pytest.mark.parametrize(
    "url",
    [
        "/srv/pictures",
        "file://other-host/srv",
        "file:///",
        "http://bucket/x",
        "memory:///",
        "s3://",
        "s3:///x",
        "s3://bucket/x?region=y",
        "s3://[bucket",
    ],
)
def test_other_blob_urls_are_refused_with_what_is_allowed(url: str) -> None:
    with pytest.raises(BlobUrlError, match="s3://bucket/prefix") as caught:
        local_folder(url, Path("/default"))
    assert repr(url) in str(caught.value)


def test_password_in_a_blob_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(BlobUrlError) as caught:
        local_folder("s3://me:hunter2@bucket/x", Path("/default"))
    assert "hunter2" not in str(caught.value)


def test_file_url_is_a_folder_with_a_folders_promises(tmp_path: Path) -> None:
    blobs = open_blobs(f"file://{tmp_path}/pictures", tmp_path)
    assert isinstance(blobs, Blobs)
    blobs.put("a/1/0.png", b"x")
    assert (tmp_path / "pictures" / "a" / "1" / "0.png").read_bytes() == b"x"
