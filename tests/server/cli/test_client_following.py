"""``submit --wait`` follows a stream, and brings the same where there is none, or half of one."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from redux_server.cli import client, main
from redux_server.cli.client import Client, ClientError
from server.api_stub import KEY, REQUEST, RESULT, STREAM, SUBMIT, TASK, Stream, Stub


def event(name: str, data: Any) -> bytes:
    return f"event: {name}\nid: x\ndata: {json.dumps(data)}\n\n".encode()


def progress(stub: Stub, step: int) -> bytes:
    known = {"step": step, "total_steps": 28}
    return event("progress", stub.task("processing", progress=known)["data"])


def begin(stub: Stub) -> bytes:
    """What a stream tells of a task that waits and is then begun."""
    waits = {"step": 0, "total_steps": 28, "queue_position": 3}
    waiting = event("progress", stub.task("created", progress=waits)["data"])
    return b"retry: 2000\n\n" + waiting + b":\n\n" + progress(stub, 1) + progress(stub, 14)


def offer(stub: Stub, kind: str, done: dict[str, Any]) -> None:
    """A stream of this kind, or what stands in its place."""
    whole = begin(stub) + event("end", done["data"])
    of_another = event("end", {**done["data"], "id": "other"})
    streams: dict[str, Stream] = {
        "whole": Stream(whole),
        "cut off": Stream(begin(stub), is_cut=True),
        "cut off in an event": Stream(whole[:-100], is_cut=True),
        "over before the end": Stream(begin(stub)),
        "silent": Stream(begin(stub), is_held=True),
        "silent from the first": Stream(b"", is_held=True),
        "empty": Stream(b""),
        "not JSON": Stream(b"data: hello\n\n" + whole),
        "no object": Stream(b"data: [1]\n\n" + whole),
        "no task": Stream(b"data: {}\n\n" + whole),
        "of another task": Stream(of_another),
    }
    if kind in streams:
        stub.answers(STREAM, streams[kind])
        stub.answers(STREAM, {"message": "No more streams"}, status=503)
    elif kind == "a page":
        stub.answers(STREAM, b"<html>", Content_Type="text/html")
    elif kind != "missing":
        stub.answers(STREAM, {"message": "No."}, status=int(kind))


FALLS_BACK = [
    "missing", "401", "429", "503", "204", "a page", "cut off", "cut off in an event",
    "over before the end", "silent", "silent from the first", "empty", "not JSON", "no object",
    "no task", "of another task",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["whole", *FALLS_BACK])
def test_the_result_is_the_same_whatever_becomes_of_the_stream(
    stub: Stub,
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "SILENCE_S", 0.3)
    stub.answers(SUBMIT, stub.task("created"))
    done = stub.completed()
    offer(stub, kind, done)
    stub.answers(RESULT, stub.task("processing"), done)
    flags = ("--url", stub.url, "--key", KEY, "--wait", "-o", str(tmp_path))
    assert main.run(["submit", "https://example.com/a.png", *flags]) == 0
    expected = [tmp_path / f"{TASK}-{i}.png" for i in (0, 1)]
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(path) for path in expected]
    assert [path.read_bytes()[-1] for path in expected] == [0, 1]
    assert "seed 7, 8" in printed.err
    assert stub.count(STREAM) >= 1
    assert stub.count(RESULT) == (0 if kind == "whole" else 2)
    assert not stub.was_waited_out


def test_a_stream_tells_how_many_wait_before_and_how_many_steps_are_done(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.answers(SUBMIT, stub.task("processing"))
    offer(stub, "whole", stub.completed())
    flags = ("--url", stub.url, "--key", KEY, "--wait", "-o", str(tmp_path))
    main.run(["submit", "https://example.com/a.png", *flags])
    said = capsys.readouterr().err.splitlines()
    assert said[1:4] == ["preparing", "queued, 3 before it", "step 1/28"]


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
