"""URLs of this server as a task's image: outputs and uploads, forged, over, or of what is gone."""

import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from e2e.live import a_picture
from redux_server.errors import BadRequest
from redux_server.pictures.submitted import check_own_url
from redux_server.storage.signing import Signer
from redux_server.tasks.task import Status, Task
from redux_server.worker.inputs import ImageLoader
from server.in_process import Api, Clock
from server.worker_bench import Bench

SUBMIT = "/api/v3/wavespeed-ai/flux-pro-redux"
KEY = f"upload-{'a' * 32}/picture.png"
OURS = "https://flux.example.com/redux"


@pytest.fixture
def signer(clock: Clock) -> Signer:
    return Signer(b"secret", clock=clock)


@pytest.mark.parametrize("base", [OURS, "http://127.0.0.1:8000", "http://elsewhere.example"])
def test_signed_url_passes_until_its_time_is_over(signer: Signer, clock: Clock, base: str) -> None:
    url = base + signer.path(KEY, clock.now + 60)
    check_own_url(url, signer, [OURS])
    clock.now += 61
    with pytest.raises(BadRequest, match="whose time is over; upload the picture again"):
        check_own_url(url, signer, [OURS])


def test_forged_url_is_refused_where_it_names_us(signer: Signer, clock: Clock) -> None:
    path = signer.path(KEY, clock.now + 60)
    forged = re.sub(r"/files/\w+/", f"/files/{'0' * 32}/", path)
    longer = re.sub(r"/\d+/upload", f"/{int(clock.now) + 10**6}/upload", path)
    for changed in (forged, longer, path[:-1], path + "x", "/files/x"):
        for base in (OURS, "https://FLUX.example.com:443", "https://flux.example.com./redux"):
            with pytest.raises(BadRequest, match="signature does not match"):
                check_own_url(base + changed, signer, ["http://other/", OURS, ""])
        # of another host it is none of our business: the guard against private addresses sees it
        check_own_url("https://other.example" + changed, signer, ["http://other/", OURS])


def test_upload_url_is_told_from_the_download_url(signer: Signer) -> None:
    with pytest.raises(BadRequest, match="give the download_url"):
        check_own_url(f"{OURS}/uploads/abc.png", signer, [OURS])


@pytest.mark.parametrize(
    "url",
    ["https://example.com/a.png", "data:image/png;base64,AA", "http://[::1",
     "https://x:99999/files/a", f"{OURS}/docs", "iVBORw0KGgo=", "\x00", "http://",
     "//flux.example.com/files/x"],
)  # fmt: skip
def test_everything_else_passes(signer: Signer, url: str) -> None:
    check_own_url(url, signer, [OURS])


# --- over HTTP ------------------------------------------------------------------------------------


def submit(api: Api, image: str, **more: Any) -> Any:
    return api.post(SUBMIT, json={"image": image, **more})


def upload(api: Api, data: bytes = a_picture()) -> str:
    files = {"file": ("a.png", data)}
    url: str = api.post("/api/v3/media/upload/binary", files=files).json()["data"]["download_url"]
    return url


def test_upload_is_an_image_and_the_echo_shows_its_url(api: Api) -> None:
    url = upload(api)
    data = submit(api, url).json()["data"]
    assert data["input"]["image"] == url
    again = api.get(f"/api/v3/predictions/{data['id']}").json()["data"]
    assert again["input"]["image"] == url


def test_forged_and_late_urls_are_a_400_before_anything_is_stored(
    api: Api, build_api: Callable[..., Api]
) -> None:
    url = upload(api)
    forged = re.sub(r"/files/\w{3}", "/files/000", url)
    late = "http://test" + api.services.signer.path(KEY, time.time() - 1)
    for image, words in ((forged, "signature does not match"), (late, "time is over")):
        answer = submit(api, image)
        assert (answer.status_code, answer.json()["error_code"]) == (400, "invalid_parameter")
        assert words in answer.json()["message"]
        assert re.search(r"\w{32}", answer.json()["message"]) is None, "no signature is repeated"
    assert api.services.store.queue_state().waiting == 0


def test_public_url_is_ours_too(build_api: Callable[..., Api]) -> None:
    api = build_api(public_url=OURS)
    assert submit(api, f"{OURS}/files/{'0' * 32}/9999999999/x/1/0.png").status_code == 400
    assert submit(api, upload(api)).status_code == 200


def test_url_of_another_key_works_for_who_has_it(api: Api) -> None:
    """As anyone may fetch it, anyone may use it: the signature is the permission."""
    url = upload(api)
    other = api.services.keys.create("other")
    assert api.post(SUBMIT, json={"image": url}, key=other).status_code == 200


# --- and the worker -------------------------------------------------------------------------------


class NoNetwork:
    """Must not be asked."""

    def fetch(self, url: str) -> bytes:
        raise AssertionError(f"fetched {url}")


def work(bench: Bench, image: str, signer: Signer) -> Task:
    images = ImageLoader(bench.blobs, signer, NoNetwork())  # type: ignore[arg-type]
    return bench.done(parameters={"image": image}, images=images)


@pytest.mark.parametrize("base", ["http://127.0.0.1:9", OURS])
def test_worker_reads_our_file_from_the_store_even_behind_a_prefix(
    bench: Bench, signer: Signer, clock: Clock, base: str
) -> None:
    bench.blobs.put(KEY, a_picture())
    task = work(bench, base + signer.path(KEY, clock.now + 60), signer)
    assert task.status is Status.COMPLETED


def test_output_of_a_task_that_was_deleted_meanwhile_fails_the_next_one_clearly(
    bench: Bench, signer: Signer, clock: Clock
) -> None:
    first = bench.done()
    assert first.outcome is not None
    url = OURS + signer.path(first.outcome.outputs[0], clock.now + 60)
    assert work(bench, url, signer).status is Status.COMPLETED
    bench.store.delete([first.id])
    bench.blobs.delete_under(first.id)
    outcome = work(bench, url, signer).outcome
    assert outcome is not None
    assert (outcome.status, outcome.code) == (Status.FAILED, 1402)
    assert "no longer kept" in outcome.error


def test_ticket_whose_file_never_came_fails_the_task_clearly(
    bench: Bench, signer: Signer, clock: Clock
) -> None:
    outcome = work(bench, OURS + signer.path(KEY, clock.now + 60), signer).outcome
    assert outcome is not None
    assert (outcome.code, "upload was not completed" in outcome.error) == (1402, True)
