"""What browsers, download tools and proxies ask of a stored picture."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from e2e.live import a_picture
from redux_server.api.services import Services
from redux_server.storage.blobs import Blobs, OpenBlob, StorageError
from redux_server.storage.opening import open_blobs
from server.in_process import Api, complete, submit
from server.s3 import BUCKET, aws, s3_server

PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4096  # 1 MiB and 8 bytes
SIZE = len(PICTURE)
KEY = "a/1/0.png"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as url, aws(url):
        yield url


@pytest.fixture(params=["folder", "bucket"])
def api(
    request: pytest.FixtureRequest,
    build_services: Callable[..., Services],
    build_api: Callable[..., Api],
    tmp_path: Path,
) -> Api:
    """An API with one picture, over each kind of store."""
    services = build_services()
    if request.param == "bucket":
        request.getfixturevalue("endpoint")
        services = replace(services, blobs=open_blobs(f"s3://{BUCKET}/downloads", tmp_path))
    services.blobs.put(KEY, PICTURE)
    return build_api(services)


def path(api: Api) -> str:
    return api.services.signer.path(KEY, time.time() + 60)


def test_whole_picture_says_its_size_type_and_tag(api: Api) -> None:
    answer = api.get(path(api), key="")
    assert (answer.status_code, answer.content) == (200, PICTURE)
    assert answer.headers["content-length"] == str(SIZE)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["etag"].startswith('"') and answer.headers["etag"].endswith('"')


def test_head_has_the_headers_of_get_and_no_body(api: Api) -> None:
    got, head = api.get(path(api)), api.request("HEAD", path(api))
    assert (head.status_code, head.content) == (200, b"")
    per_request = {"x-request-id", "date"}
    shown = [{k: v for k, v in a.headers.items() if k not in per_request} for a in (got, head)]
    assert shown[0] == shown[1]


@pytest.mark.parametrize(
    ("asked", "first", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=1048000-", 1048000, SIZE),
        (f"bytes=5-{SIZE * 2}", 5, SIZE),
        ("bytes=-8", SIZE - 8, SIZE),
        (f"bytes=-{SIZE * 2}", 0, SIZE),
    ],
)
def test_part_of_a_picture(api: Api, asked: str, first: int, end: int) -> None:
    answer = api.get(path(api), headers={"Range": asked})
    assert (answer.status_code, answer.content) == (206, PICTURE[first:end])
    assert answer.headers["content-range"] == f"bytes {first}-{end - 1}/{SIZE}"
    assert answer.headers["content-length"] == str(end - first)
    assert answer.headers["content-type"] == "image/png"


@pytest.mark.parametrize(
    "asked",
    ["bytes=5-3", "bytes=-", "bytes=0-1,4-5", "items=0-1", "bytes=a-b", "bytes=" + "9" * 99],
)
def test_range_that_is_none_is_ignored(api: Api, asked: str) -> None:
    answer = api.get(path(api), headers={"Range": asked})
    assert (answer.status_code, answer.content) == (200, PICTURE)


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", f"bytes={SIZE + 5}-{SIZE + 9}", "bytes=-0"])
def test_range_beyond_the_end_is_416_with_the_size(api: Api, asked: str) -> None:
    answer = api.get(path(api), headers={"Range": asked})
    assert (answer.status_code, answer.content) == (416, b"")
    assert answer.headers["content-range"] == f"bytes */{SIZE}"


def test_known_picture_is_not_sent_again(api: Api) -> None:
    tag = api.get(path(api)).headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        answer = api.get(path(api), headers={"If-None-Match": known})
        assert (answer.status_code, answer.content) == (304, b""), known
        assert answer.headers["etag"] == tag
    changed = api.get(path(api), headers={"If-None-Match": '"other"'})
    assert (changed.status_code, changed.content) == (200, PICTURE)


def test_download_goes_on_only_with_the_same_picture(api: Api) -> None:
    tag = api.get(path(api)).headers["etag"]
    same = api.get(path(api), headers={"Range": "bytes=9-", "If-Range": tag})
    other = api.get(path(api), headers={"Range": "bytes=9-", "If-Range": '"other"'})
    assert (same.status_code, same.content) == (206, PICTURE[9:])
    assert (other.status_code, other.content) == (200, PICTURE)


def test_deleted_picture_is_a_404(api: Api) -> None:
    api.services.blobs.delete_under("a")
    for headers in ({}, {"Range": "bytes=0-9"}):
        answer = api.get(path(api), headers=headers)
        assert (answer.status_code, answer.json()["error_code"]) == (404, "not_found")


def test_picture_comes_in_small_pieces(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    blobs.put(KEY, PICTURE)

    async def read() -> list[int]:
        return [len(piece) async for piece in (await blobs.open(KEY)).chunks]

    sizes = asyncio.run(read())
    assert sum(sizes) == SIZE
    assert max(sizes) < SIZE / 2


class Breaking(Blobs):
    """Opens, and then cannot read."""

    async def open(self, key: str, *, first: int = 0, end: int | None = None) -> OpenBlob:
        async def chunks() -> AsyncIterator[bytes]:
            raise StorageError("input/output error")
            yield b""

        return OpenBlob(SIZE, "", chunks())


def test_store_that_breaks_before_the_first_byte_is_a_503(
    build_services: Callable[..., Services], build_api: Callable[..., Api], tmp_path: Path
) -> None:
    api = build_api(replace(build_services(), blobs=Breaking(tmp_path)))
    answer = api.get(path(api))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_output_is_downloaded_without_a_key(api: Api) -> None:
    data = submit(api)
    api.services.blobs.put(f"{data['id']}/1/0.png", a_picture())
    complete(api.services.store, lambda task: [f"{task.id}/1/0.png"])
    (url,) = api.get(f"/api/v3/predictions/{data['id']}").json()["data"]["outputs"]
    response = api.get(url, key="")
    assert response.status_code == 200
    assert response.content == a_picture()
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "private" in response.headers["cache-control"]


@pytest.mark.parametrize(
    ("data", "kind"),
    [(b"<script>alert(1)</script>", "application/octet-stream"), (a_picture(), "image/png")],
)
def test_content_type_is_what_the_bytes_are(api: Api, data: bytes, kind: str) -> None:
    api.services.blobs.put("a/1/0.png", data)
    response = api.get(api.services.signer.path("a/1/0.png", time.time() + 60))
    assert response.headers["content-type"] == kind
