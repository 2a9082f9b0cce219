"""Uploads: tickets and forms, over each kind of store; how long they are kept; what is refused."""

import io
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from PIL import Image
from sqlalchemy import Engine

from e2e.live import a_picture
from redux_server.api import housekeeping
from redux_server.api.routes.uploads import FORM_PATHS
from redux_server.api.services import Services
from redux_server.pictures import uploads
from redux_server.pictures.upload_records import FILE_BYTES, UploadRecords
from redux_server.pictures.uploads import TICKET_S, Uploads
from redux_server.storage.disk import DiskSpace
from redux_server.storage.opening import open_blobs
from server.in_process import Api, Clock
from server.s3 import BUCKET, aws, s3_server

TICKETS = "/api/v3/media/uploads"
SUBMIT = "/api/v3/wavespeed-ai/flux-pro-redux"
PICTURE = a_picture()
OTHER = a_picture(colour="red")
PAGE = b"<!DOCTYPE html><html><script>alert(1)</script></html>" * 10
DRAWING = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>' * 10


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as url, aws(url):
        yield url


@pytest.fixture
def clock() -> Clock:
    return Clock(time.time())


@pytest.fixture
def build(
    build_services: Callable[..., Services],
    build_api: Callable[..., Api],
    clock: Clock,
    database: Engine,
) -> Callable[..., Api]:
    """APIs with a clock to turn, and parts of their own."""

    def build(*, disk: DiskSpace | None = None, blobs: Any = None, **settings: Any) -> Api:
        services = build_services(**settings)
        parts: dict[str, Any] = {
            "blobs": blobs or services.blobs, "signer": services.signer,
            "threads": services.storage_threads,
            "disk": disk or services.disk, "folder": services.settings.data_dir,
            "records": UploadRecords(database, clock=clock),
        }  # fmt: skip
        ours = Uploads(services.settings, **parts, clock=clock)
        return build_api(replace(services, blobs=parts["blobs"], uploads=ours))

    return build


@pytest.fixture(params=["folder", "bucket"])
def stored_api(request: pytest.FixtureRequest, build: Callable[..., Api], tmp_path: Path) -> Api:
    """An API over each kind of store."""
    if request.param == "folder":
        return build()
    request.getfixturevalue("endpoint")
    return build(blobs=open_blobs(f"s3://{BUCKET}/{tmp_path.name}", tmp_path))


@pytest.fixture
def api(build: Callable[..., Api]) -> Api:
    return build()


def ticket(api: Api, size: int = len(PICTURE), **more: Any) -> dict[str, Any]:
    answer = api.post(TICKETS, json={"filename": "a.png", "size": size, **more})
    assert answer.status_code == 200, answer.text
    data: dict[str, Any] = answer.json()["data"]
    return data


def path_of(url: str) -> str:
    return httpx.URL(url).path


def put(api: Api, given: dict[str, Any], body: Any = PICTURE, **more: Any) -> Any:
    """Send ``body`` as the ticket says: its method, URL and headers, and no key."""
    upload = given["upload"]
    headers = {**upload["headers"], **more.pop("headers", {})}
    return api.request(upload["method"], path_of(upload["url"]), key="", content=body,
                       headers=headers, **more)  # fmt: skip


def form(api: Api, data: bytes = PICTURE, *, path: str = FORM_PATHS[0], **more: Any) -> Any:
    return api.post(path, files={"file": ("my photo.png", data)}, **more)


def check_error(answer: Any, status: int, *words: str) -> None:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["code"] == status and body["data"] is None
    assert body["message"] == body["error"]
    for word in words:
        assert word in body["message"]


def kept(api: Api) -> set[str]:
    """What is kept of uploads."""
    found = api.services.blobs.tasks_before(time.time() + 60)
    return {name for name in found if name.startswith("upload-")}


# --- tickets --------------------------------------------------------------------------------------


def test_ticket_has_what_clients_read_and_its_file_can_be_fetched(stored_api: Api) -> None:
    given = ticket(stored_api, content_type="image/png")
    assert {**given, "download_url": "", "upload": {}} == {
        "type": "image", "filename": "a.png", "size": len(PICTURE), "download_url": "", "upload": {}
    }  # fmt: skip
    upload = given["upload"]
    assert (upload["method"], upload["headers"]) == ("PUT", {"Content-Type": "image/png"})
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", upload["expires_at"])
    assert stored_api.get(path_of(given["download_url"]), key="").status_code == 404
    answer = put(stored_api, given)
    assert answer.status_code == 200
    assert answer.json()["data"]["size"] == len(PICTURE)
    for url in (given["download_url"], answer.json()["data"]["download_url"]):
        got = stored_api.get(path_of(url), key="")
        assert (got.status_code, got.content) == (200, PICTURE)
        assert got.headers["content-type"] == "image/png"


def test_file_may_come_in_pieces_of_no_declared_length(api: Api) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(PICTURE), 10):
            yield PICTURE[at : at + 10]

    given = ticket(api)
    assert put(api, given, pieces()).status_code == 200
    assert api.get(path_of(given["download_url"]), key="").content == PICTURE


def test_same_file_may_be_sent_again_and_another_changes_nothing(stored_api: Api) -> None:
    given = ticket(stored_api, max(len(PICTURE), len(OTHER)))
    first = PICTURE.ljust(given["size"], b"\0")
    assert put(stored_api, given, first).status_code == 200
    assert put(stored_api, given, first).status_code == 200
    check_error(put(stored_api, given, OTHER.ljust(given["size"], b"\0")), 409, "stays")
    assert stored_api.get(path_of(given["download_url"]), key="").content == first


@pytest.mark.parametrize("is_declared", [True, False])
def test_file_of_another_size_is_refused(api: Api, is_declared: bool) -> None:
    async def pieces(body: bytes) -> AsyncIterator[bytes]:
        yield body

    given = ticket(api)
    for body in (PICTURE[:-1], PICTURE + b"x", b"", PICTURE * 300):
        answer = put(api, given, body if is_declared else pieces(body))
        check_error(answer, 400)
        assert "announced with" in answer.text or "empty" in answer.text
    assert not kept(api)


def test_ticket_ends_after_an_hour(api: Api, clock: Clock) -> None:
    given = ticket(api)
    clock.now += TICKET_S - 1
    assert put(api, given).status_code == 200
    clock.now += 3
    check_error(put(api, given), 410, "time", "ask for another")


def test_nothing_of_a_ticket_can_be_changed(api: Api) -> None:
    given = ticket(api)
    path = path_of(given["upload"]["url"])
    assert f"/{given['filename']}" not in path  # hex digits before ".png" may end in its letter
    for at in range(len("/uploads/"), len(path)):
        changed = path[:at] + ("1" if path[at] != "1" else "2") + path[at + 1 :]
        answer = api.request("PUT", changed, key="", content=PICTURE)
        assert answer.status_code == 404, changed
    assert not kept(api)


def test_ticket_is_no_download_url_and_the_other_way_round(api: Api) -> None:
    """What opens the one must not open the other: neither seal fits."""
    signer = api.services.signer
    given = ticket(api)
    put(api, given)
    key = signer.key_of(given["download_url"])
    seal, text = path_of(given["upload"]["url"]).removeprefix("/uploads/").split(".", 1)
    expiry = text.split(".")[0]
    assert api.get(f"/files/{seal}/{expiry}/{key}", key="").status_code == 404
    signature = path_of(given["download_url"]).split("/")[2]
    assert api.request("PUT", f"/uploads/{signature}.{text}", key="").status_code == 404
    assert api.request("PUT", path_of(given["download_url"]), content=OTHER).status_code in (
        404,
        405,
    )
    assert api.get(path_of(given["download_url"]), key="").content == PICTURE


def test_ticket_is_the_permission_whoever_sends_it(api: Api) -> None:
    """A ticket of one key is used with another's, and with a wrong one: keys do not matter."""
    other = api.services.keys.create("other")
    for key in (other, "frs_wrong"):
        given = ticket(api)
        answer = put(api, given, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 200
        assert api.get(path_of(given["download_url"]), key="").content == PICTURE


def test_ticket_needs_a_key(api: Api) -> None:
    assert api.post(TICKETS, key="", json={"filename": "a", "size": 1}).status_code == 401


NAMES = (
    "../../tasks.db", "/etc/passwd", "..\\..\\x.png", "a/b/../c.png", "\0.png", "x" * 1000, ".",
    "..", "", "ä ö.png", "con", "%2e%2e%2f", "a\r\nX-Evil: 1", "<script>.svg", "a.html",
)  # fmt: skip


def test_file_name_is_echoed_and_goes_nowhere_else(api: Api, tmp_path: Path) -> None:
    before = {path for path in tmp_path.rglob("*") if "blobs" not in path.parts}
    for name in NAMES:
        given = ticket(api, filename=name)
        assert given["filename"] == name
        assert put(api, given).status_code == 200
        for url in (given["upload"]["url"], given["download_url"]):
            assert re.search(r"[0-9a-f]{32}(/picture)?\.(png|jpg)$", url), url
    after = {path for path in tmp_path.rglob("*") if "blobs" not in path.parts}
    assert {path.name for path in after - before} <= {"tasks.db-wal", "tasks.db-shm"}
    stored = [path.name for path in api.services.settings.blobs_dir.rglob("*.*")]
    assert stored == ["picture.png"] * len(NAMES)


WRONG: tuple[Any, ...] = (
    {}, {"filename": "a"}, {"size": 0}, {"size": -1}, {"size": "9"}, {"size": True}, {"size": 1.5},
    {"filename": 5, "size": 1}, {"filename": "x" * 2000, "size": 1},
    {"size": 1, "content_type": "a\r\nb: c"}, {"size": 1, "content_type": "text"},
    {"size": 1, "content_type": 7}, [], "x", None, 5,
)  # fmt: skip


def test_wrong_announcement_is_told_how_it_should_be(api: Api) -> None:
    for body in WRONG:
        check_error(api.post(TICKETS, json=body), 400)
    for content in (b"", b"{", b'{"size": 1e400}', b'{"filename": "\\ud800", "size": 1}'):
        check_error(api.post(TICKETS, content=content), 400)


def test_url_ends_in_what_the_file_should_be(api: Api) -> None:
    for name, kind, ending in (
        ("a.JPEG", None, "jpg"), ("a.webp", "image/png", "webp"), ("upload", "image/gif", "gif"),
        ("a.html", "text/html", "png"), ("upload", None, "png"),
    ):  # fmt: skip
        given = ticket(api, filename=name, content_type=kind)
        assert given["download_url"].endswith(f".{ending}")


# --- forms ----------------------------------------------------------------------------------------


def test_form_is_stored_and_told_in_every_known_shape(stored_api: Api) -> None:
    for path in FORM_PATHS:
        answer = form(stored_api, path=path)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        data = body["data"]
        assert (body["code"], body["message"]) == (200, "success") and "error" not in body
        assert (data["type"], data["filename"]) == ("image", "my photo.png")
        assert data["size"] == len(PICTURE)
        assert data["url"] == data["download_url"]
        assert stored_api.get(path_of(data["url"]), key="").content == PICTURE


def test_urls_begin_as_the_operator_says(build: Callable[..., Api]) -> None:
    api = build(public_url="https://flux.example.com/redux/")
    given = ticket(api)
    assert given["upload"]["url"].startswith("https://flux.example.com/redux/uploads/")
    for url in (given["download_url"], form(api).json()["data"]["url"]):
        assert url.startswith("https://flux.example.com/redux/files/")
        assert api.services.signer.key_of(url)


def test_what_is_no_picture_is_not_kept(api: Api) -> None:
    for data, words in (
        (PAGE, "an HTML page"), (DRAWING, "an SVG drawing"), (b"%PDF-1.7" * 20, "a PDF"),
        (b"x", "no known picture"), (b"\0" * 10**6, "no known picture"),
    ):  # fmt: skip
        check_error(form(api, data), 400, words, "PNG")
        given = ticket(api, len(data), filename="a.png", content_type="image/png")
        check_error(put(api, given, data), 400, words)
    check_error(form(api, b""), 400, "empty")
    assert not kept(api)


def test_page_behind_a_picture_is_served_as_the_picture(api: Api) -> None:
    """A file that is both keeps the picture's type, and browsers may not guess another."""
    got = api.get(path_of(form(api, PICTURE + PAGE).json()["data"]["url"]), key="")
    assert got.headers["content-type"] == "image/png"
    assert got.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in got.headers["content-security-policy"]


def test_broken_form_leaves_nothing(api: Api) -> None:
    request = httpx.Request("POST", "http://x/", files={"file": ("a.png", PICTURE)})
    body, kind = request.read(), request.headers["content-type"]
    for content in (body[:-5], body[: len(body) // 2], b""):
        answer = api.post(FORM_PATHS[0], content=content, headers={"Content-Type": kind})
        check_error(answer, 400)
    check_error(api.post(FORM_PATHS[0], content=PICTURE), 400, "multipart/form-data")
    check_error(api.post(FORM_PATHS[0], json={"file": "x"}), 400, "multipart/form-data")
    assert not kept(api)
    assert not api.services.uploads._open


# --- limits ---------------------------------------------------------------------------------------


def test_file_over_the_limit_is_a_413_whichever_way_it_comes(build: Callable[..., Api]) -> None:
    api = build(max_upload=1)
    large = PICTURE + bytes(2**20 - len(PICTURE))
    assert form(api, large).status_code == 200
    assert put(api, ticket(api, len(large)), large).status_code == 200
    for data in (large + b"x", large * 3):
        check_error(form(api, data), 413, "1 MiB")
        answer = api.post(TICKETS, json={"filename": "a.png", "size": len(data)})
        check_error(answer, 413, f"{len(data):,} bytes", "1 MiB")
    assert len(kept(api)) == 2


def test_endless_file_is_refused_soon_after_the_limit(build: Callable[..., Api]) -> None:
    api = build(max_upload=1)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        head = '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        yield head.encode() + PICTURE
        while sent < 2**28:
            sent += 2**16
            yield bytes(2**16)

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    check_error(api.post(FORM_PATHS[0], content=endless(), headers=headers), 413)
    assert sent < 3 * 2**20
    assert not list(api.services.settings.data_dir.glob("tmp*"))


def test_uploads_at_a_time_are_bounded_and_their_places_come_back(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_OPEN_PER_OWNER", 2)
    ours = api.services.uploads
    key_id = api.services.keys.recognise(api.key) or ""
    with ours.receive(key_id), ours.receive(key_id):
        answer = form(api)
        check_error(answer, 429, "Too many uploads")
        assert answer.headers["retry-after"] == "5"
        check_error(put(api, ticket(api)), 429)
        assert form(api, key=api.services.keys.create("other")).status_code == 200
        monkeypatch.setattr(uploads, "MAX_OPEN", 2)
        check_error(form(api, key=api.services.keys.create("third")), 429)
    assert form(api).status_code == 200
    assert not ours._open


def test_uploads_have_the_rate_of_submits_but_a_count_of_their_own(
    build: Callable[..., Api],
) -> None:
    api = build(rate_limit=2)
    assert form(api).status_code == 200
    ticket(api)
    for answer in (form(api), api.post(TICKETS, json={"filename": "a", "size": 1})):
        check_error(answer, 429, "2 files a minute")
        assert int(answer.headers["retry-after"]) >= 1
    assert api.post(SUBMIT, json={"image": "https://example.com/a.png"}).status_code == 200


def test_nearly_full_disk_takes_no_upload(build: Callable[..., Api], tmp_path: Path) -> None:
    free = 2**30
    disk = DiskSpace([tmp_path], floor_bytes=2**20, free=lambda _: free)
    api = build(disk=disk)
    given = ticket(api)
    free = 2**19
    for answer in (form(api), put(api, given), api.post(TICKETS, json={"size": 1})):
        check_error(answer, 503, "nearly full")
        assert answer.headers["retry-after"] == "30"
    assert not kept(api)


def test_disk_that_fills_up_meanwhile_ends_an_upload(
    build: Callable[..., Api], tmp_path: Path
) -> None:
    free = [40 * 2**20]
    disk = DiskSpace([tmp_path], floor_bytes=2**20, free=lambda _: free[0])
    api = build(disk=disk)

    async def pieces() -> AsyncIterator[bytes]:
        yield PICTURE
        for _ in range(64):
            free[0] -= 4 * 2**20
            yield bytes(2**18)

    given = ticket(api, len(PICTURE) + 64 * 2**18)
    check_error(put(api, given, pieces()), 503, "nearly full")
    assert free[0] > -(2**20), "it was refused while it came"


def test_store_that_is_away_is_a_503(build: Callable[..., Api], tmp_path: Path) -> None:
    api = build()
    os.chmod(api.services.settings.blobs_dir, 0o500)
    if os.access(api.services.settings.blobs_dir, os.W_OK):
        # Who may write everywhere: let a file stand in the folder's place.
        api.services.settings.blobs_dir.rmdir()
        api.services.settings.blobs_dir.write_bytes(b"")
    check_error(form(api), 503, "could not be stored")
    check_error(put(api, ticket(api)), 503, "could not be stored")


# --- how long -------------------------------------------------------------------------------------


def test_uploads_are_kept_for_their_time_and_an_hour_and_then_swept(
    build: Callable[..., Api], clock: Clock
) -> None:
    api = build(upload_retention_hours=5, retention_hours=1)
    url = form(api).json()["data"]["download_url"]
    given = ticket(api)
    put(api, given)
    clock.now += 5 * 3600 - 60
    assert housekeeping.sweep_strays(api.services) == api.services.uploads.sweep(clock()) == 0
    assert len(kept(api)) == 2
    clock.now += 3600
    assert api.services.uploads.sweep(clock()) == 0
    clock.now += 120
    assert api.services.uploads.sweep(clock()) == 2
    assert not kept(api)
    assert api.get(path_of(url), key="").status_code == 404


def test_sweeps_of_other_things_leave_uploads_alone_however_old(api: Api, clock: Clock) -> None:
    form(api)
    for path in api.services.settings.blobs_dir.rglob("*.png"):
        os.utime(path, (1, 1))
    assert housekeeping.sweep_strays(api.services) == 0
    assert housekeeping.sweep(api.services) == 0
    assert len(kept(api)) == 1
    assert api.services.uploads.sweep(clock()) == 1


# --- what is told of it ---------------------------------------------------------------------------


def test_no_signature_and_no_file_name_is_logged(api: Api) -> None:
    with structlog.testing.capture_logs() as lines:
        given = ticket(api, filename="secret-name.png")
        put(api, given)
        put(api, given, OTHER)
        form(api)
    text = str(lines)
    seals = re.findall(r"[0-9a-f]{32}", given["upload"]["url"] + given["download_url"])
    assert len(lines) >= 4 and "/uploads/..." in text
    assert not [seal for seal in seals if seal in text]
    assert "secret-name" not in text and api.key not in text


def test_headers_of_clients_do_no_harm_even_without_a_body(api: Api) -> None:
    headers = {
        "Content-Type": "application/json", "X-Client-Name": "wavespeed-python",
        "X-Client-Version": "2.0.5", "X-Client-OS": "linux",
    }  # fmt: skip
    task = api.post(SUBMIT, json={"image": "https://example.com/a.png"}, headers=headers)
    for path in (f"/api/v3/predictions/{task.json()['data']['id']}/result", "/livez"):
        assert api.get(path, headers=headers).status_code == 200


def test_picture_is_the_one_that_was_sent(api: Api) -> None:
    got = api.get(path_of(form(api).json()["data"]["url"]), key="")
    assert Image.open(io.BytesIO(got.content)).getpixel((1, 1)) == (0, 128, 128)


# --- what a key stores ----------------------------------------------------------------------------


def listed(api: Api, query: str = "", **more: Any) -> dict[str, Any]:
    answer = api.get(f"{TICKETS}{query}", **more)
    assert answer.status_code == 200, answer.text
    data: dict[str, Any] = answer.json()["data"]
    return data


def test_owner_lists_uploads_newest_first(api: Api, clock: Clock) -> None:
    form(api)
    clock.now += 1
    given = ticket(api, filename="b.png")
    clock.now += 1
    sent = ticket(api, filename="c.png")
    put(api, sent)
    found = listed(api)
    assert [(each["filename"], each["status"]) for each in found["items"]] == [
        ("c.png", "stored"), ("b.png", "announced"), ("my photo.png", "stored"),
    ]  # fmt: skip
    assert (found["page"], found["total"]) == (1, 3)
    assert found["stored_bytes"] == 3 * (len(PICTURE) + FILE_BYTES)
    assert found["items"][0]["download_url"] == sent["download_url"]
    assert api.get(path_of(found["items"][2]["download_url"]), key="").content == PICTURE
    assert given["upload"]["expires_at"] == found["items"][1]["expires_at"]
    second = listed(api, "?page=2&page_size=2")
    assert [each["filename"] for each in second["items"]] == ["my photo.png"]


@pytest.mark.parametrize("query", ["?page=0", "?page=x", "?page_size=101", "?page=%C2%B2"])
def test_list_refuses_what_is_no_page(api: Api, query: str) -> None:
    check_error(api.get(f"{TICKETS}{query}"), 400, "must be an integer from 1 to")


def test_owner_deletes_uploads_and_nobody_else(stored_api: Api) -> None:
    api = stored_api
    urls = [form(api).json()["data"]["url"] for _ in range(3)]
    ids = [each["id"] for each in listed(api)["items"]]
    stranger = api.services.keys.create("stranger")
    assert listed(api, key=stranger)["items"] == []
    check_error(api.request("DELETE", f"{TICKETS}/{ids[0]}", key=stranger), 404, ids[0])
    answer = api.post(f"{TICKETS}/delete", json={"ids": ids}, key=stranger)
    assert answer.json()["data"] == {"deleted_count": 0}
    assert len(kept(api)) == 3
    assert api.request("DELETE", f"{TICKETS}/{ids[0]}").json()["data"] == {"deleted_count": 1}
    check_error(api.request("DELETE", f"{TICKETS}/{ids[0]}"), 404)
    answer = api.post(f"{TICKETS}/delete", json={"ids": [*ids, "x", ids[1]]})
    assert answer.json()["data"] == {"deleted_count": 2}
    assert not kept(api) and listed(api)["total"] == 0
    assert {api.get(path_of(url), key="").status_code for url in urls} == {404}


def test_upload_that_is_deleted_while_it_comes_is_not_kept(api: Api) -> None:
    given = ticket(api)
    [record] = listed(api)["items"]
    api.request("DELETE", f"{TICKETS}/{record['id']}")
    check_error(put(api, given), 410, "was deleted")
    assert not kept(api)


def test_key_stores_no_more_than_it_may_and_others_do(build: Callable[..., Api]) -> None:
    api = build(max_stored_uploads=1)
    big = PICTURE + bytes(2**20 - len(PICTURE) - 3 * FILE_BYTES)
    assert form(api, big).status_code == 200
    check_error(form(api, PICTURE + bytes(FILE_BYTES)), 413, "room for", "/api/v3/media/uploads")
    answer = api.post(TICKETS, json={"size": 2 * FILE_BYTES})
    check_error(answer, 413, "room for 16,384 bytes more")  # besides what the file itself counts
    assert len(kept(api)) == 1
    stranger = api.services.keys.create("stranger")
    assert form(api, big, key=stranger).status_code == 200
    [record] = listed(api)["items"]
    api.request("DELETE", f"{TICKETS}/{record['id']}")
    assert form(api, big).status_code == 200


def test_announced_files_count_as_long_as_they_may_come(
    build: Callable[..., Api], clock: Clock
) -> None:
    api = build(max_stored_uploads=1)
    ticket(api, 2**20 - FILE_BYTES)
    check_error(form(api), 413, "room for 0 bytes more")
    clock.now += 2 * TICKET_S + 1
    api.services.uploads.sweep(clock())
    assert form(api).status_code == 200


def test_file_that_could_not_be_stored_does_not_count(
    build: Callable[..., Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    api = build()

    def fail(*_: Any) -> None:
        raise OSError("away")

    monkeypatch.setattr(type(api.services.blobs), "put", fail)
    check_error(form(api), 503)
    assert listed(api)["total"] == 0


def test_one_key_leaves_half_of_the_disk_to_others(
    build: Callable[..., Api], tmp_path: Path
) -> None:
    free = 4 * 2**20
    disk = DiskSpace([tmp_path], floor_bytes=2**20, free=lambda _: free)
    api = build(disk=disk)
    size = len(PICTURE) + 2**18
    stored = 0
    while (answer := form(api, PICTURE + bytes(2**18))).status_code == 200:
        stored += size
        free -= size
    check_error(answer, 413, "left on the disk for others")
    assert 2**20 < stored <= 3 * 2**19
    stranger = api.services.keys.create("stranger")
    assert form(api, PICTURE + bytes(2**18), key=stranger).status_code == 200


def test_swept_uploads_are_no_longer_listed(api: Api, clock: Clock) -> None:
    form(api)
    clock.now += api.services.settings.upload_retention_hours * 3600 + uploads.GRACE_S + 1
    api.services.uploads.sweep(clock())
    assert listed(api)["total"] == 0
