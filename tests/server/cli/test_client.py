"""The client against a small HTTP server that speaks the wire contract."""

import io
import json
import socket
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from redux_server.cli import client, main
from redux_server.cli import submit as submit_module
from redux_server.cli.client import Client, ClientError
from redux_server.cli.progress import ProgressReport
from redux_server.pictures.inline import decode
from redux_server.settings import ClientSettings, UsageError
from server.api_stub import KEY, PNG, REQUEST, RESULT, SUBMIT, TASK, Stub


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"  # PNG bytes under a wrong name
    Image.new("RGB", (32, 32), "teal").save(path, "PNG")
    return path


def submit(stub_url: str, image: object, *flags: str, key: str = KEY) -> int:
    return main.run(["submit", str(image), "--url", stub_url, "--key", key, *flags])


def test_without_wait_the_id_and_the_result_url_are_printed(
    stub: Stub, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.answers(SUBMIT, stub.task("created"))
    assert submit(stub.url, photo) == 0
    assert capsys.readouterr().out.splitlines() == [TASK, stub.url + RESULT]
    assert [path for _, path, _, _ in stub.seen] == [SUBMIT]


def test_a_file_is_sent_as_a_data_uri_of_its_true_type(stub: Stub, photo: Path) -> None:
    stub.answers(SUBMIT, stub.task("created"))
    submit(stub.url, photo, "--prompt", "a lighthouse", "--seed", "0", "--size", "512*768")
    _, _, headers, body = stub.seen[0]
    sent = json.loads(body)
    assert headers["authorization"] == f"Bearer {KEY}"
    assert sent["image"].startswith("data:image/png;base64,")
    assert decode(sent["image"]) == photo.read_bytes()
    assert (sent["prompt"], sent["seed"], sent["size"]) == ("a lighthouse", 0, "512*768")


def test_quality_is_sent_if_it_was_given(stub: Stub, photo: Path) -> None:
    stub.answers(SUBMIT, stub.task("created"))
    submit(stub.url, photo, "--quality", "fast")
    submit(stub.url, photo)
    assert [json.loads(body)["quality"] for _, _, _, body in stub.seen] == ["fast", None]


def test_pictures_and_what_counts_of_them_are_sent(stub: Stub, photo: Path) -> None:
    stub.answers(SUBMIT, stub.task("created"))
    url = "https://example.com/b.png"
    flags = ["--images", url, str(photo), "--image-weights", "1,0,2.5", "--mask", str(photo)]
    submit(stub.url, photo, *flags, "--redux-pooling", "9", "--output-format", "jpeg")
    sent = json.loads(stub.seen[0][3])
    assert sent["images"][0] == url
    assert decode(sent["images"][1]) == decode(sent["mask"]) == photo.read_bytes()
    asked = sent["image_weights"], sent["redux_pooling"], sent["output_format"]
    assert asked == ([1, 0, 2.5], 9, "jpeg")


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


def test_a_url_is_sent_as_it_is(stub: Stub) -> None:
    stub.answers(SUBMIT, stub.task("created"))
    submit(stub.url + "/", "https://example.com/a.png?x=1")
    assert json.loads(stub.seen[0][3])["image"] == "https://example.com/a.png?x=1"


def test_with_wait_the_images_are_saved_and_their_paths_printed(
    stub: Stub, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.answers(SUBMIT, stub.task("created"))
    half = {"step": 14, "total_steps": 28}
    stub.answers(
        RESULT, stub.task("created"), stub.task("processing", progress=half), stub.completed()
    )
    out = tmp_path / "new" / "folder"
    assert submit(stub.url, photo, "--wait", "-o", str(out)) == 0
    expected = [out / f"{TASK}-{i}.png" for i in (0, 1)]
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(path) for path in expected]
    assert [path.read_bytes()[-1] for path in expected] == [0, 1]
    assert sorted(out.iterdir()) == expected, "no partial files stay"
    for text in ("queued", "step 14/28", "seed 7, 8"):
        assert text in printed.err


def test_outputs_are_fetched_without_the_key(stub: Stub, photo: Path, tmp_path: Path) -> None:
    stub.answers(SUBMIT, stub.completed())
    submit(stub.url, photo, "--wait", "-o", str(tmp_path))
    downloads = [headers for _, path, headers, _ in stub.seen if path.startswith("/files/")]
    assert len(downloads) == 2
    assert not any("authorization" in headers for headers in downloads)


def test_a_withheld_image_is_said(
    stub: Stub, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.answers(SUBMIT, stub.completed(flags=(False, True)))
    submit(stub.url, photo, "--wait", "-o", str(tmp_path))
    errors = capsys.readouterr().err
    assert f"{TASK}-1.png is black: the safety checker withheld" in errors
    assert f"{TASK}-0.png is black" not in errors


def test_polls_are_quick_at_first_and_then_one_a_second(stub: Stub) -> None:
    asked: list[float] = []
    stub.answers(SUBMIT, stub.task("created"))
    stub.answers(RESULT, *[stub.task("processing")] * 8, stub.completed())
    with closing(Client(stub.url, KEY, sleep=asked.append)) as api:
        api.wait(api.submit(REQUEST), lambda *_: None)
    assert asked[0] == pytest.approx(0.2)
    assert asked == sorted(asked)
    assert asked[-1] == 1.0


def test_a_failed_task_says_why_and_is_an_error(
    stub: Stub, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.answers(SUBMIT, stub.task("created"))
    stub.answers(RESULT, stub.task("failed", error="The picture is damaged."))
    assert submit(stub.url, photo, "--wait", "-o", str(tmp_path)) == 1
    assert f"task {TASK} failed: The picture is damaged." in capsys.readouterr().err


@pytest.mark.parametrize("status", [400, 401, 404, 413, 503])
def test_an_http_error_shows_the_servers_message(
    stub: Stub, photo: Path, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    stub.answers(SUBMIT, {"code": status, "message": "Because so.", "data": None}, status=status)
    assert submit(stub.url, photo) == 1
    assert capsys.readouterr().err == "flux-redux: Because so.\n"
    assert len(stub.seen) == 1, "a submit is not repeated"


def test_an_error_without_a_message_shows_status_and_address(
    stub: Stub, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.answers(SUBMIT, b"<html>", status=502)
    assert submit(stub.url, photo) == 1
    assert f"HTTP 502 Bad Gateway from {stub.url}" in capsys.readouterr().err


def test_another_kind_of_server_is_recognised(
    stub: Stub, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.answers(SUBMIT, b"<html>hello</html>")
    assert submit(stub.url, photo) == 1
    assert "is not a FLUX Redux Server" in capsys.readouterr().err


def test_a_task_id_cannot_lead_out_of_the_folder(stub: Stub) -> None:
    stub.answers(SUBMIT, stub.task("completed", id="../../escape"))
    with closing(Client(stub.url, KEY)) as api, pytest.raises(ClientError):
        api.submit(REQUEST)


def test_a_redirect_is_told_to_the_user(
    stub: Stub, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.answers(SUBMIT, b"", status=301, Location="https://flux.example/api")
    assert submit(stub.url, photo) == 1
    assert "redirects to https://flux.example/api; correct --url" in capsys.readouterr().err


def test_no_server_is_said_with_its_address(
    photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert submit(url, photo) == 1
    error = capsys.readouterr().err
    assert f"cannot reach the server at {url}" in error
    assert "flux-redux serve" in error
    assert len(error.splitlines()) == 1


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


def test_cancel_names_the_task_and_says_what_became_of_it(
    stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    path = f"/api/v3/predictions/{TASK}/cancel"
    stub.answers(path, stub.task("processing"), stub.task("cancelled"))
    for said in ("stops at its next step", f"task {TASK} cancelled"):
        assert main.run(["cancel", TASK, "--url", stub.url, "--key", KEY]) == 0
        assert said in capsys.readouterr().out
    assert [(method, where) for method, where, *_ in stub.seen] == [("POST", path)] * 2
    assert all(headers["authorization"] == f"Bearer {KEY}" for _, _, headers, _ in stub.seen)


@pytest.mark.parametrize("task_id", ["../../x", "", TASK + "?a"])
def test_cancel_sends_nothing_for_what_is_no_id(
    stub: Stub, capsys: pytest.CaptureFixture[str], task_id: str
) -> None:
    assert main.run(["cancel", task_id, "--url", stub.url, "--key", KEY]) == 1
    assert "is no task's id" in capsys.readouterr().err
    assert not stub.seen


def test_cancel_of_an_unknown_task_tells_the_servers_words(
    stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.answers(f"/api/v3/predictions/{TASK}/cancel", {"message": "No task here"}, status=404)
    assert main.run(["cancel", TASK, "--url", stub.url, "--key", KEY]) == 1
    assert "No task here" in capsys.readouterr().err


def test_interrupting_the_wait_says_how_to_fetch_the_result(
    stub: Stub,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "poll", interrupt)
    stub.answers(SUBMIT, stub.task("created"))
    assert submit(stub.url, photo, "--wait", "-o", str(tmp_path)) == 130
    error = capsys.readouterr().err
    assert "the task goes on" in error
    assert stub.url + RESULT in error
    assert KEY not in error


def test_a_missing_key_says_how_to_make_one(
    photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLUX_REDUX_KEY", raising=False)
    assert main.run(["submit", str(photo)]) == main.EXIT_USAGE
    assert "flux-redux keys create --name me" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["frs_\u2026", "frs_a\nb"])
def test_a_key_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(UsageError, match="copy it again"):
        Client("http://127.0.0.1:1", key)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:0", "http://[x"])
def test_an_unusable_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="--url must be like"):
        Client(url, KEY)


def test_a_wrong_parameter_is_refused_in_the_words_of_the_api(
    stub: Stub, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(stub.url, photo, "--num-images", "9", "--guidance-scale", "nan") == 2
    error = capsys.readouterr().err
    assert "num_images must be an integer from 1 to 4; got 9." in error
    assert "guidance_scale must be a number from 1 to 20; got" in error
    assert stub.seen == []


def test_a_file_that_is_not_there_is_said(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(stub.url, tmp_path / "nope.png") == 1
    assert "nope.png: No such file or directory" in capsys.readouterr().err


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(submit_module.MAX_BYTES + 1)
    with pytest.raises(ClientError, match=r"has 20\.0 MiB; allowed are 20 MiB"):
        submit_module.picture(str(path))


def test_an_empty_key_in_the_environment_is_no_key() -> None:
    settings = ClientSettings(key=" ")
    with pytest.raises(UsageError, match="no API key"):
        submit_module.submit(settings, image="x", images=[], mask="", wait=False, out=".")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(ClientError, match=r"cannot write .*taken\.png"):
        client.save(tmp_path / "taken.png", PNG)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar() -> None:
    stream = _Terminal()
    with closing(ProgressReport(stream)) as progress:
        progress.show("queued", detail=", 3 before it")
        progress.show("step", 12, 28)
    assert "queued, 3 before it" in stream.getvalue()
    assert "step 12/28" in stream.getvalue()
    assert "\r" in stream.getvalue()


def test_a_file_gets_lines_now_and_then() -> None:
    stream, now = io.StringIO(), [0.0]
    with closing(ProgressReport(stream, clock=lambda: now[0])) as progress:
        for step in range(1, 29):
            now[0] += 1.0
            progress.show("step", step, 28)
    assert stream.getvalue().splitlines() == ["step 1/28", "step 16/28"]


def test_a_file_gets_no_line_for_each_place_in_the_queue() -> None:
    stream = io.StringIO()
    with closing(ProgressReport(stream, clock=lambda: 100.0)) as progress:
        for position in range(900, 0, -1):
            progress.show("queued", detail=f", {position} before it")
    assert stream.getvalue().splitlines() == ["queued, 900 before it"]
