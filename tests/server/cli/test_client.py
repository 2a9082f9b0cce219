"""The client against a small HTTP server that speaks the wire contract: polling and following."""

from contextlib import closing
from pathlib import Path

import httpx
import pytest

from redux_server.cli import client
from redux_server.cli.client import Client, ClientError
from redux_server.settings import UsageError
from server.api_stub import KEY, PNG, REQUEST, RESULT, STREAM, SUBMIT, TASK, Stream, Stub
from server.cli.streams import begin, event, progress


@pytest.mark.parametrize(
    ("name", "saved"), [("0.jpeg", ".jpeg"), ("0.webp", ".webp"), ("0.exe", ".png"), ("0", ".png")]
)
def test_file_has_the_extension_of_its_url(
    name: str, saved: str, stub: Stub, tmp_path: Path
) -> None:
    stub.answers(f"/files/{name}", PNG)
    task = stub.task("completed", outputs=[f"{stub.url}/files/{name}"])["data"]
    with closing(Client(stub.url, KEY)) as api:
        assert api.download(task, tmp_path) == [tmp_path / f"{TASK}-0{saved}"]


def test_polls_are_quick_at_first_and_then_one_a_second(stub: Stub) -> None:
    asked: list[float] = []
    stub.answers(SUBMIT, stub.task("created"))
    stub.answers(RESULT, *[stub.task("processing")] * 8, stub.completed())
    with closing(Client(stub.url, KEY, sleep=asked.append)) as api:
        api.wait(api.submit(REQUEST), lambda *_: None)
    assert asked[0] == pytest.approx(0.2)
    assert asked == sorted(asked)
    assert asked[-1] == 1.0


def test_a_task_id_cannot_lead_out_of_the_folder(stub: Stub) -> None:
    stub.answers(SUBMIT, stub.task("completed", id="../../escape"))
    with closing(Client(stub.url, KEY)) as api, pytest.raises(ClientError):
        api.submit(REQUEST)


def test_a_full_queue_is_waited_for_as_long_as_the_server_says(
    stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[float] = []
    stub.answers(SUBMIT, {"message": "The queue is full."}, status=429, Retry_After="7")
    stub.answers(SUBMIT, {"message": "The queue is full."}, status=429, Retry_After="9000")
    stub.answers(SUBMIT, stub.task("created"))
    with closing(Client(stub.url, KEY, sleep=asked.append)) as api:
        assert api.submit(REQUEST)["id"] == TASK
    assert asked == [7.0, client.MAX_PAUSE_S]
    assert "The queue is full. Next try in 7 s." in capsys.readouterr().err


def test_a_queue_that_stays_full_is_given_up(stub: Stub) -> None:
    asked: list[float] = []
    stub.answers(SUBMIT, {"message": "The queue is full."}, status=429)
    with (
        closing(Client(stub.url, KEY, sleep=asked.append)) as api,
        pytest.raises(ClientError, match="queue is full"),
    ):
        api.submit(REQUEST)
    assert len(stub.seen) == client.TRIES
    assert asked == [5.0] * (client.TRIES - 1)


def test_polling_outlives_a_server_that_is_away_for_a_moment(stub: Stub) -> None:
    stub.answers(SUBMIT, stub.task("created"))
    stub.answers(RESULT, b"", b"", status=503)
    stub.answers(RESULT, stub.completed())
    with closing(Client(stub.url, KEY, sleep=lambda _: None)) as api:
        assert api.wait(api.submit(REQUEST), lambda *_: None)["status"] == "completed"


def test_urls_of_the_same_host_are_fetched_the_way_we_reach_it(stub: Stub, tmp_path: Path) -> None:
    # As behind a proxy that ends TLS and publishes another port.
    task = stub.completed()["data"]
    task["outputs"] = ["http://127.0.0.1:1/files/0.png"]
    task["urls"] = {"get": f"https://127.0.0.1{RESULT}"}
    stub.answers(RESULT, stub.task("completed"))
    with closing(Client(stub.url, KEY, sleep=lambda _: None)) as api:
        assert api.poll(task)["status"] == "completed"
        assert api.download(task, tmp_path) == [tmp_path / f"{TASK}-0.png"]


def test_an_expired_output_is_an_error_and_leaves_no_file(stub: Stub, tmp_path: Path) -> None:
    task = stub.task("completed", outputs=[f"{stub.url}/files/gone.png"])["data"]
    with (
        closing(Client(stub.url, KEY)) as api,
        pytest.raises(ClientError, match=r"image 0 of task .*: not here"),
    ):
        api.download(task, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["frs_\u2026", "frs_a\nb"])
def test_a_key_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(UsageError, match="copy it again"):
        Client("http://127.0.0.1:1", key)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:0", "http://[x"])
def test_an_unusable_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="--url must be like"):
        Client(url, KEY)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(ClientError, match=r"cannot write .*taken\.png"):
        client.save(tmp_path / "taken.png", PNG)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]


# --- streams --------------------------------------------------------------------------------------


def test_a_stream_that_the_server_ends_is_taken_up_again(stub: Stub) -> None:
    stub.answers(SUBMIT, stub.task("created"))
    stub.answers(STREAM, Stream(begin(stub)), Stream(event("end", stub.completed()["data"])))
    stub.answers(RESULT, stub.task("processing"))
    with closing(Client(stub.url, KEY, sleep=lambda _: None)) as api:
        done = api.wait(api.submit(REQUEST), lambda _: None)
    assert done["status"] == "completed"
    assert (stub.count(STREAM), stub.count(RESULT)) == (2, 1)


def test_one_that_cannot_be_followed_is_not_tried_at_each_poll(stub: Stub) -> None:
    stub.answers(SUBMIT, stub.task("created"))
    stub.answers(RESULT, *[stub.task("processing")] * 5, stub.completed())
    with closing(Client(stub.url, KEY, sleep=lambda _: None)) as api:
        api.wait(api.submit(REQUEST), lambda _: None)
    assert (stub.count(STREAM), stub.count(RESULT)) == (1, 6)


def test_streams_that_break_at_once_are_followed_no_faster_than_polls(stub: Stub) -> None:
    asked: list[float] = []
    stub.answers(SUBMIT, stub.task("created"))
    stub.answers(STREAM, Stream(progress(stub, 1), is_cut=True))
    stub.answers(RESULT, *[stub.task("processing")] * 8, stub.completed())
    with closing(Client(stub.url, KEY, sleep=asked.append)) as api:
        api.wait(api.submit(REQUEST), lambda _: None)
    assert len(asked) == stub.count(STREAM) == 9
    assert asked[-1] == 1.0


@pytest.mark.parametrize("kind", ["stream", "poll"])
def test_a_failure_is_told_in_the_same_words(stub: Stub, kind: str) -> None:
    stub.answers(SUBMIT, stub.task("created"))
    failed = stub.task("failed", error="The picture is damaged.")
    if kind == "stream":
        stub.answers(STREAM, Stream(begin(stub) + event("end", failed["data"])))
    stub.answers(RESULT, failed)
    with (
        closing(Client(stub.url, KEY, sleep=lambda _: None)) as api,
        pytest.raises(ClientError, match=f"^task {TASK} failed: The picture is damaged.$"),
    ):
        api.wait(api.submit(REQUEST), lambda _: None)


@pytest.mark.parametrize("kind", ["stream", "poll"])
def test_a_task_that_was_deleted_is_told_of_in_the_same_words(stub: Stub, kind: str) -> None:
    gone = {"code": 404, "message": "No task here", "data": None}
    stub.answers(SUBMIT, stub.task("created"))
    if kind == "stream":
        stub.answers(STREAM, Stream(begin(stub) + event("gone", gone)))
    stub.answers(RESULT, gone, status=404)
    with (
        closing(Client(stub.url, KEY, sleep=lambda _: None)) as api,
        pytest.raises(ClientError, match=r"^No task here$"),
    ):
        api.wait(api.submit(REQUEST), lambda _: None)


def test_the_key_goes_with_the_request_for_the_stream(stub: Stub) -> None:
    stub.answers(SUBMIT, stub.task("created"))
    stub.answers(STREAM, Stream(event("end", stub.completed()["data"])))
    with closing(Client(stub.url, KEY)) as api:
        api.wait(api.submit(REQUEST), lambda _: None)
    (headers,) = [headers for _, path, headers, _ in stub.seen if path == STREAM]
    assert headers["authorization"] == f"Bearer {KEY}"
    assert headers["accept"] == "text/event-stream"


def test_data_of_several_lines_are_one_and_an_event_that_is_cut_short_is_none(stub: Stub) -> None:
    text = ': ping\n\nid: 1\ndata: {}\n\n: ping\n\nevent: end\ndata: {"a":\ndata:  1}\n\ndata: {'
    stub.answers(STREAM, Stream(text.encode()))
    with httpx.Client() as http:
        assert list(client.follow(http, stub.url + STREAM, {})) == [{}, {"a": 1}]
