"""``submit`` and ``cancel`` as users call them, against a stub that speaks the wire contract."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from redux_server.cli import client, main
from redux_server.cli import submit as submit_module
from redux_server.cli.client import Client, ClientError
from redux_server.pictures.inline import decode
from redux_server.settings import ClientSettings, UsageError
from server.api_stub import KEY, RESULT, STREAM, SUBMIT, TASK, Stub
from server.cli.streams import offer


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


def test_an_empty_key_in_the_environment_is_no_key() -> None:
    settings = ClientSettings(key=" ")
    with pytest.raises(UsageError, match="no API key"):
        submit_module.submit(settings, image="x", images=[], mask="", wait=False, out=".")


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


def test_submit_loads_no_database_and_no_web_framework() -> None:
    code = (
        "import sys, redux_server.cli.submit; "
        "print({'torch', 'sqlalchemy', 'fastapi', 'uvicorn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --- streams --------------------------------------------------------------------------------------


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


# --- cancel ---------------------------------------------------------------------------------------


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
