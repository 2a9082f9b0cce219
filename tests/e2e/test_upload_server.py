"""Uploads, sync mode and base64 output of a live server: slow clients, lost ones, its own end."""

import base64
import io
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from wavespeed import Client

from e2e.live import (
    MODEL_PATH,
    LiveServer,
    a_picture,
    data_uri,
    download,
    plain_client,
    prediction,
    terminate,
    wait_until,
)

MODEL = "wavespeed-ai/flux-pro-redux"
QUICK = {"image": data_uri(a_picture()), "size": "512*512", "num_inference_steps": 1}
LONG = {**QUICK, "num_inference_steps": 50, "num_images": 4}  # four seconds of fake-slow
BIG = 8 * 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server whose steps take 20 ms, and that holds requests for two seconds."""
    data_dir = tmp_path_factory.mktemp("uploads") / "data"
    with LiveServer(data_dir, "--sync-timeout-s", "2", model="fake-slow") as server:
        yield server


@pytest.fixture
def client(server: LiveServer) -> Client:
    return Client(api_key=server.key, base_url=server.base_url)


# --- with the official SDK ------------------------------------------------------------------------


def test_sdk_uploads_a_file_and_uses_it_as_the_image(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "photo ö.png"
    path.write_bytes(a_picture(90, 70))
    url = client.upload(str(path))
    assert download(url).size == (90, 70)
    output = client.run(MODEL, {**QUICK, "image": url}, poll_interval=0.1)
    again = client.run(MODEL, {**QUICK, "image": output["outputs"][0]}, poll_interval=0.1)
    assert download(again["outputs"][0]).size == (512, 512)
    with plain_client() as http:
        assert http.get(client.upload(io.BytesIO(a_picture()))).content == a_picture()


def test_sdk_is_told_why_an_upload_fails(client: Client) -> None:
    with pytest.raises(RuntimeError, match=r"HTTP 413: .*20 MiB"):
        client.upload(io.BytesIO(bytes(21 * 2**20)))
    with pytest.raises(RuntimeError, match=r"HTTP 400: .*an HTML page"):
        client.upload(io.BytesIO(b"<!doctype html><html></html>" * 20))
    with pytest.raises(RuntimeError, match=r"HTTP 400: .*at least 1"):
        client.upload(io.BytesIO(b""))


def test_sdk_gets_the_outputs_in_one_request(client: Client) -> None:
    (url,) = client.run(MODEL, dict(QUICK), enable_sync_mode=True)["outputs"]
    assert download(url).size == (512, 512)


def test_sdk_gets_base64_in_sync_mode_and_by_polling(client: Client) -> None:
    for sync in (True, False):
        given = {**QUICK, "enable_base64_output": True, "num_images": 2}
        outputs = client.run(MODEL, given, enable_sync_mode=sync, poll_interval=0.1)["outputs"]
        assert len(outputs) == 2
        for each in outputs:
            assert Image.open(io.BytesIO(base64.b64decode(each, validate=True))).format == "PNG"


def test_sdk_knows_that_the_wait_was_too_short_and_the_task_ends(
    client: Client, server: LiveServer
) -> None:
    started = time.monotonic()
    told = client.run_no_throw(MODEL, dict(LONG), enable_sync_mode=True)
    assert time.monotonic() - started >= 2
    assert (told["outputs"], told["status"]) == (None, "processing")
    assert server.wait(told["task_id"])["status"] == "completed"


def test_sdk_is_told_why_a_task_failed_in_sync_mode(client: Client) -> None:
    with pytest.raises(RuntimeError, match=r"Prediction failed \(task_id: \w{32}\): .*address"):
        client.run(MODEL, {**QUICK, "image": "http://127.0.0.1:9/a.png"}, enable_sync_mode=True)


# --- connections ----------------------------------------------------------------------------------


def test_client_that_leaves_does_not_cancel_its_task(server: LiveServer) -> None:
    body = httpx.Request("POST", "http://x", json={**LONG, "enable_sync_mode": True}).read()
    head = (
        f"POST {MODEL_PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
        f"X-Request-Id: leaves\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), 20) as connection:
        connection.sendall(head + body)
        time.sleep(0.5)
    server.log_with('"request_id": "leaves"')
    assert time.monotonic() - started < 2, "its place is free before the limit"

    def ended() -> list[str]:
        lines = server.log.splitlines()
        return [line for line in lines if "leaves" in line and '"task ended"' in line]

    wait_until(lambda: bool(ended()), 60, what=lambda: server.log)
    assert '"status": "completed"' in ended()[0]


def upload_slowly(server: LiveServer, seconds: float, path: str, statuses: list[Any]) -> None:
    """One file of ``BIG`` bytes in a form, in so many seconds."""
    pieces = 16

    def body() -> Iterator[bytes]:
        head = '--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
        yield head.encode() + a_picture()
        for _ in range(pieces):
            yield bytes(BIG // pieces)
            time.sleep(seconds / pieces)
        yield b"\r\n--x--\r\n"

    with server.client() as http:
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        statuses.append(http.post(path, content=body(), headers=headers, timeout=120).status_code)


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def test_slow_uploads_at_a_time_cost_little_memory(server: LiveServer) -> None:
    """32 files of 8 MiB, 256 MiB in all, while polls are answered beside them."""
    path = "/api/v3/media/upload/binary"
    upload_slowly(server, 0, path, [])  # what a first one loads is no part of it
    before = peak = resident_bytes(server.pid)
    statuses: list[Any] = []
    threads = [threading.Thread(target=upload_slowly, args=(server, 4.0, path, statuses))
               for _ in range(32)]  # fmt: skip
    for thread in threads:
        thread.start()
    slowest = 0.0
    with server.client() as http:
        while any(thread.is_alive() for thread in threads):
            started = time.monotonic()
            assert http.get("/livez").status_code == 200
            slowest = max(slowest, time.monotonic() - started)
            peak = max(peak, resident_bytes(server.pid))
            time.sleep(0.05)
    assert statuses == [200] * 32
    print(f"RSS {before >> 20} MiB, at most {peak >> 20} MiB; slowest probe {slowest:.2f} s")
    assert peak - before < 64 * 2**20


def test_held_requests_are_answered_when_the_server_is_told_to_stop(tmp_path: Path) -> None:
    with LiveServer(tmp_path / "data", model="fake-slow") as server:
        answers: list[dict[str, Any]] = []

        def hold() -> None:
            with server.client() as http:
                body = {**LONG, "enable_sync_mode": True}
                answers.append(prediction(http.post(MODEL_PATH, json=body, timeout=60)))

        threads = [threading.Thread(target=hold) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        stopping = threading.Thread(target=terminate, args=(server.process, 60))
        started = time.monotonic()
        stopping.start()
        wait_until(lambda: len(answers) == 3, 5, what=lambda: server.log)
        took_s = time.monotonic() - started
        for thread in [*threads, stopping]:
            thread.join(60)
    assert took_s < 3
    for answer in answers:
        assert (answer["status"], answer["code"]) == ("processing", 5004)
        assert "Sync mode timed out" in answer["error"]
