"""``uploads list`` and ``uploads delete`` as users call them, against a live server and a stub."""

import httpx
import pytest

from e2e.live import LiveServer, a_picture
from redux_server.cli import main
from server.api_stub import KEY, Stub

LIST = "/api/v3/media/uploads"


def upload(live: LiveServer, name: str) -> None:
    answer = httpx.post(
        f"{live.base_url}/api/v3/media/upload/binary",
        files={"file": (name, a_picture())},
        headers={"Authorization": f"Bearer {live.key}"},
        trust_env=False,
    )
    assert answer.status_code == 200, answer.text


def run(live: LiveServer, *words: str) -> int:
    return main.run(["uploads", *words, "--url", live.base_url, "--key", live.key])


def test_files_are_listed_and_deleted(live: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one.png", "two \x1b[31m.png"):
        upload(live, name)
    assert run(live, "list") == 0
    shown = capsys.readouterr()
    newest, oldest, *_ = shown.out.splitlines()
    assert "two" in newest and "\x1b" not in newest, "a file's name moves the cursor"
    assert "stored" in oldest and oldest.endswith("one.png")
    assert "of 1,024 MiB" in shown.err
    ids = [line.split()[0] for line in (newest, oldest)]
    assert run(live, "delete", *ids) == 0
    assert capsys.readouterr().out == "deleted 2\n"
    assert run(live, "delete", *ids) == 1
    shown = capsys.readouterr()
    assert shown.out == "deleted 0\n"
    assert "uploads list" in shown.err
    run(live, "list")
    assert not set(ids) & set(capsys.readouterr().out.split())


def test_long_list_is_read_page_by_page(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    def page(count: int, first: int) -> dict[str, object]:
        files = [
            {"id": f"{first + number:032x}", "filename": "a.png", "size": 1, "status": "stored",
             "created_at": "2026-04-01T12:34:56.789Z"}
            for number in range(count)
        ]  # fmt: skip
        data = {"items": files, "stored_bytes": 5, "max_stored_bytes": 2**20}
        return {"code": 200, "message": "success", "data": data}

    stub.answers(f"{LIST}?page=1&page_size=100", page(100, 0))
    stub.answers(f"{LIST}?page=2&page_size=100", page(3, 100))
    assert main.run(["uploads", "list", "--url", stub.url, "--key", KEY]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 103


def test_server_that_is_none_of_ours_is_named(
    stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.answers(f"{LIST}?page=1&page_size=100", {"data": []})
    assert main.run(["uploads", "list", "--url", stub.url, "--key", KEY]) == 1
    assert "not a FLUX Redux Server" in capsys.readouterr().err
