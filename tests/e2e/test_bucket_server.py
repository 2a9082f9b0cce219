"""A whole server, API and worker process, whose pictures are in a bucket."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.live import LiveServer, a_picture, data_uri, download, plain_client
from server.s3 import BUCKET, aws, s3_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    data_dir = tmp_path_factory.mktemp("bucket") / "data"
    with (
        s3_server() as endpoint,
        aws(endpoint),
        LiveServer(data_dir, "--blob-url", f"s3://{BUCKET}/live") as live,
    ):
        yield live


def test_pictures_go_in_and_out_through_a_bucket(server: LiveServer) -> None:
    body = {"image": data_uri(a_picture()), "size": "512*520", "num_images": 2}
    task = server.run(body)
    assert task["status"] == "completed", task
    assert [download(url).size for url in task["outputs"]] == [(512, 520)] * 2
    assert not (server.data_dir / "blobs").exists()
    again = server.run({**body, "image": task["outputs"][0]})
    assert again["status"] == "completed", again


def test_head_and_part_of_a_picture_over_http(server: LiveServer) -> None:
    (url,) = server.run({"image": data_uri(a_picture()), "size": "512*512"})["outputs"]
    with plain_client() as client:
        whole, head = client.get(url), client.head(url)
        part = client.get(url, headers={"Range": "bytes=8-99"})
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) == len(whole.content)
    assert (part.status_code, part.content) == (206, whole.content[8:100])


def test_server_does_not_start_over_a_bucket_that_is_away(tmp_path: Path) -> None:
    with aws("http://127.0.0.1:9"):
        server = LiveServer(tmp_path / "data", "--blob-url", f"s3://{BUCKET}/x")
        server.start(wait=False)
        assert server.process.wait(60) not in (0, -15), "must be an exit code of its own"
    assert f"--blob-url s3://{BUCKET}/x cannot be used: the endpoint does not answer" in server.log
    assert "Traceback" not in server.log
