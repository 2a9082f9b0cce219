"""Pictures in a bucket: the same promises as in a folder, and clear words when it is away."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from e2e.live import a_picture, data_uri
from redux_pipelines.fake import FakePipeline
from redux_server.api.services import Services
from redux_server.cli.serve import build_services
from redux_server.net.fetch import ImageFetcher
from redux_server.net.guard import AddressPolicy
from redux_server.settings import ServerSettings, UsageError
from redux_server.storage.blobs import BlobStore, StorageError
from redux_server.storage.buckets import BucketBlobs
from redux_server.storage.opening import open_blobs
from redux_server.tasks.task import NewTask
from redux_server.worker.batch import BatchRunner
from redux_server.worker.inputs import ImageGone, ImageLoader
from redux_server.worker.loop import Worker
from server.in_process import Api, Clock
from server.s3 import BUCKET, aws, s3_server
from server.worker_bench import INPUT, ME, OTHER, GatedPipeline, Safety
from threaded import answering

SUBMIT = "/api/v3/wavespeed-ai/flux-pro-redux"
CLOSED = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def s3(endpoint: str) -> Iterator[str]:
    """An S3 endpoint that obstore will find."""
    with aws(endpoint):
        yield endpoint


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """A prefix of this test's own."""
    return f"s3://{BUCKET}/{request.node.name[:40].strip('[]')}"


@pytest.fixture
def bucket(s3: str, url: str, tmp_path: Path) -> BlobStore:
    return open_blobs(url, tmp_path)


def names(endpoint: str, url: str) -> str:
    """What the bucket lists under ``url``, as XML: not through obstore."""
    prefix = url.removeprefix(f"s3://{BUCKET}/")
    return plain_get(f"{endpoint}/{BUCKET}?list-type=2&prefix={prefix}").text


def plain_get(url: str) -> httpx.Response:
    """What the bucket holds, not through obstore. Our S3 does not check signatures."""
    name = "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request"
    response = httpx.get(url, headers={"Authorization": name}, trust_env=False, timeout=60)
    return response.raise_for_status()


# --- storage --------------------------------------------------------------------------------------


def test_what_was_put_can_be_got(bucket: BlobStore, s3: str, url: str) -> None:
    bucket.put("a/1/0.png", b"one")
    bucket.put("a/1/0.png", b"two")
    assert bucket.get("a/1/0.png") == b"two"
    assert plain_get(f"{s3}/{url.removeprefix('s3://')}/a/1/0.png").content == b"two"


def test_missing_blob_is_a_file_not_found(bucket: BlobStore) -> None:
    with pytest.raises(FileNotFoundError):
        bucket.get("a/1/0.png")


def test_missing_bucket_is_not_a_missing_blob(s3: str, tmp_path: Path) -> None:
    """Else a task would fail for good with "no longer kept"."""
    away = open_blobs("s3://no-such-bucket/x", tmp_path)
    with pytest.raises(StorageError, match="bucket does not exist"):
        away.get("a/input")
    with pytest.raises(StorageError):
        away.put("a/input", b"x")
    with pytest.raises(StorageError, match="NoSuchBucket"):
        away.tasks_before(time.time())


def test_delete_under_takes_one_task_and_no_other(bucket: BlobStore) -> None:
    for key in ("a/input", "a/1/0.png", "a/2/0.png", "ab/1/0.png"):
        bucket.put(key, b"x")
    bucket.delete_under("a")
    for key in ("a/input", "a/1/0.png", "a/2/0.png"):
        with pytest.raises(FileNotFoundError):
            bucket.get(key)
    assert bucket.get("ab/1/0.png") == b"x"
    bucket.delete_under("a")  # again: nothing there is no error


def check_many(bucket: BlobStore, count: int) -> None:
    """Put so many tasks' blobs, and one task with as many, and find and delete them all."""
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: bucket.put(f"t{n:04}/1/0.png", b"x"), range(count)))
        list(threads.map(lambda n: bucket.put(f"one/1/{n}.png", b"x"), range(count)))
    expected = {"one", *(f"t{number:04}" for number in range(count))}
    assert bucket.tasks_before(time.time() + 60) == expected
    assert bucket.tasks_before(time.time() - 3600) == set()
    bucket.delete_under("one")
    assert bucket.tasks_before(time.time() + 60) == expected - {"one"}


def test_more_blobs_than_one_answer_lists(
    bucket: BlobStore, s3: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    check_many(bucket, 25)
    assert names(s3, url).count("<Key>") == 10, "everything fits into one answer"


@pytest.mark.slow
def test_more_than_a_thousand_blobs(bucket: BlobStore) -> None:
    check_many(bucket, 1005)


def test_prefixes_of_one_bucket_do_not_see_each_other(s3: str, url: str, tmp_path: Path) -> None:
    one, other = (open_blobs(f"{url}/{name}", tmp_path) for name in ("one", "other"))
    one.put("a/1/0.png", b"x")
    other.delete_under("a")
    assert other.tasks_before(time.time() + 60) == set()
    assert one.get("a/1/0.png") == b"x"


# --- at the start ---------------------------------------------------------------------------------


def test_check_leaves_nothing_behind(bucket: BlobStore, s3: str, url: str) -> None:
    bucket.check()
    assert "<Key>" not in names(s3, url)
    bucket.put("a/1/0.png", b"x")
    assert names(s3, url).count("<Key>") == 1, "this test would not see what is left"


@pytest.mark.parametrize(
    ("name", "variables", "says"),
    [
        ("x", {"AWS_ENDPOINT_URL": CLOSED}, "does not answer"),
        ("401-403", {"AWS_ENDPOINT_URL": CLOSED}, "does not answer"),  # numbers are no status
        ("x", {"AWS_ENDPOINT_URL": CLOSED, "AWS_ALLOW_HTTP": ""}, "AWS_ALLOW_HTTP=true"),
        ("x", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no credentials were found"),
    ],
)
def test_store_that_cannot_be_used_is_told_in_time(
    tmp_path: Path, name: str, variables: dict[str, str], says: str
) -> None:
    with aws(CLOSED, **variables):
        started = time.monotonic()
        with pytest.raises(UsageError, match=says) as caught:
            build_services(ServerSettings(data_dir=tmp_path, blob_url=f"s3://{name}/y"))
        assert time.monotonic() - started < 5
    assert f"--blob-url s3://{name}/y" in str(caught.value)
    assert "testing-secret" not in str(caught.value)


def test_missing_bucket_is_told_at_the_start(s3: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the bucket does not exist"):
        build_services(ServerSettings(data_dir=tmp_path, blob_url="s3://no-such-bucket/y"))


def test_endpoint_that_accepts_and_says_nothing_is_told_in_time(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host, port = silent.getsockname()
        with aws(f"http://{host}:{port}"):
            started = time.monotonic()
            with pytest.raises(StorageError, match="does not answer"):
                open_blobs("s3://x/y", tmp_path).check()
            assert time.monotonic() - started < 5


@pytest.mark.parametrize("status", [401, 403])
def test_store_that_refuses_without_a_word_is_understood(tmp_path: Path, status: int) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.send_error(status)

        def log_message(self, *_: object) -> None: ...

    said = pytest.raises(StorageError, match="the credentials are not accepted")
    with (
        answering(ThreadingHTTPServer(("127.0.0.1", 0), Refusing)) as server,
        aws(f"http://127.0.0.1:{server.server_port}"),
        said,
    ):
        open_blobs("s3://x/y", tmp_path).check()


# --- API and worker over a bucket -----------------------------------------------------------------


@pytest.fixture
def services(build_services: Callable[..., Services], s3: str, url: str) -> Services:
    return build_services(blob_url=url)


def worker_of(services: Services, name: str = ME, **parts: Any) -> Worker:
    loader = ImageLoader(
        services.blobs, services.signer, ImageFetcher(AddressPolicy.from_entries(()))
    )
    given: dict[str, Any] = {"pipeline": FakePipeline(), "safety": Safety(), "images": loader}
    given |= parts
    ours = {"heartbeat_s": given.pop("heartbeat_s", 0.5)}
    runner = BatchRunner(blobs=services.blobs, worker_id=name, **given)
    return Worker(name, store=services.store, runner=runner, **ours)


def test_task_goes_through_a_bucket_from_end_to_end(
    services: Services, build_api: Callable[..., Api], s3: str, url: str
) -> None:
    assert isinstance(services.blobs, BucketBlobs)
    api = build_api(services)
    body = {"image": data_uri(a_picture()), "size": "512*520", "num_images": 2}
    task_id = api.post(SUBMIT, json=body).json()["data"]["id"]
    assert f"{task_id}/input" in names(s3, url)
    assert worker_of(services).step()
    data = api.get(f"/api/v3/predictions/{task_id}/result").json()["data"]
    assert data["status"] == "completed", data
    pictures = [api.get(output, key="") for output in data["outputs"]]
    assert [picture.status_code for picture in pictures] == [200, 200]
    assert all(picture.headers["content-type"] == "image/png" for picture in pictures)
    assert all(int(p.headers["content-length"]) == len(p.content) for p in pictures)
    # An output fed back as the next image is read from the bucket, not fetched.
    again = api.post(SUBMIT, json={**body, "image": data["outputs"][0]}).json()["data"]["id"]
    assert worker_of(services).step()
    after = api.get(f"/api/v3/predictions/{again}/result").json()["data"]
    assert after["status"] == "completed", after


def test_zombie_never_overwrites_its_successors_images(
    services: Services, database: Engine
) -> None:
    clock = Clock(time.time())
    services.store._clock = clock
    services.blobs.put("in/input", a_picture())
    services.store.accept(
        [NewTask("key", "model", {**INPUT, "image": "blob:in/input"})], max_open=9
    )
    pipeline = GatedPipeline()
    zombie = worker_of(services, pipeline=pipeline, heartbeat_s=600)
    thread = threading.Thread(target=zombie.step)
    thread.start()
    try:
        assert pipeline.is_running.wait(20)
        clock.now += 31
        assert worker_of(services, OTHER).step()
        (task_id,) = services.blobs.tasks_before(time.time() + 60) - {"in"}
        (task,) = services.store.get([task_id])
        assert task is not None and task.outcome is not None
        key = f"{task_id}/2/0.png"
        assert task.outcome.outputs == [key]
        finished = services.blobs.get(key)
    finally:
        pipeline.open()
        thread.join(20)
    assert not thread.is_alive()
    assert services.blobs.get(f"{task_id}/1/0.png"), "the zombie wrote nothing, or elsewhere"
    assert services.blobs.get(key) == finished
    assert services.store.get([task_id]) == [task]


def test_bucket_that_is_away_is_a_503_for_a_download(
    build_services: Callable[..., Services], build_api: Callable[..., Api], url: str
) -> None:
    with aws(CLOSED):
        api = build_api(build_services(blob_url=url))
        path = api.services.signer.path("a/1/0.png", time.time() + 60)
        answer = api.get(path, key="")
        refused = api.post(SUBMIT, json={"image": data_uri(a_picture())})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert api.services.store.queue_state().waiting == 0


def test_full_queue_is_still_a_429_while_the_bucket_is_away(
    build_services: Callable[..., Services], build_api: Callable[..., Api], url: str
) -> None:
    with aws(CLOSED):
        api = build_api(build_services(blob_url=url, max_queue=1))
        body = {"image": "https://example.com/a.png"}
        assert [api.post(SUBMIT, json=body).status_code for _ in range(2)] == [200, 429]


def test_bucket_that_goes_away_in_mid_task_costs_time_and_no_task(
    build_services: Callable[..., Services],
    url: str,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("redux_server.worker.outputs._PAUSES_S", (0.1,))
    with ExitStack() as server:
        endpoint = server.enter_context(s3_server())
        with aws(endpoint):
            services = build_services(blob_url=url)
            services.store._clock = clock
            services.blobs.put("in/input", a_picture())
            new = NewTask("key", "model", {**INPUT, "image": "blob:in/input"})
            services.store.accept([new], max_open=9)
            pipeline = GatedPipeline()
            worker = worker_of(services, pipeline=pipeline)
            thread = threading.Thread(target=worker.step)
            thread.start()
            assert pipeline.is_running.wait(20)
            server.close()  # after the picture was read, before the images are stored
            pipeline.open()
            thread.join(90)
            assert not thread.is_alive()
            (task,) = services.store.get([new.id])
            assert task is not None and task.outcome is None, "was failed"
            assert services.store.queue_state().running == 0, "waits for its lease to end"

            server.enter_context(s3_server(int(endpoint.rpartition(":")[2])))
            clock.now += 6
            assert worker.step()
            (task,) = services.store.get([new.id])
            assert task is not None and task.outcome is not None
            assert task.outcome.outputs == [f"{new.id}/2/0.png"]
            assert services.blobs.get(f"{new.id}/2/0.png").startswith(b"\x89PNG")


def test_input_that_is_gone_and_one_that_cannot_be_read_are_told_apart(
    services: Services, url: str, tmp_path: Path
) -> None:
    fetcher = ImageFetcher(AddressPolicy.from_entries(()))
    with pytest.raises(ImageGone):
        ImageLoader(services.blobs, services.signer, fetcher).load(
            "blob:none/input", lambda image: image
        )
    with aws(CLOSED):
        away = open_blobs(url, tmp_path)
        with pytest.raises(StorageError):
            ImageLoader(away, services.signer, fetcher).load("blob:none/input", lambda image: image)
