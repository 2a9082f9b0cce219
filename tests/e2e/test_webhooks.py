"""Webhooks of a live server: its worker ends the task, its API process tells, a crash between."""

import json
import threading
from pathlib import Path

from e2e.live import MODEL_PATH, LiveServer, a_picture, data_uri, prediction, wait_until
from server.receiver import Received, is_signed, receiving


def test_webhook_outlives_a_failing_receiver_and_the_crash_of_the_server(tmp_path: Path) -> None:
    calls: list[Received] = []
    lock = threading.Lock()

    def answer(call: Received) -> int:
        with lock:
            calls.append(call)
            return 503 if len(calls) == 1 else 204

    server = LiveServer(tmp_path / "data", "--webhook-allow", "127.0.0.1:*")
    with receiving(answer) as port, server:
        body = {"image": data_uri(a_picture()), "size": "512*512"}
        hook = f"http://127.0.0.1:{port}/hook?token=s3cret"
        with server.client() as client:
            task = prediction(client.post(MODEL_PATH, json=body, params={"webhook": hook}))
            secret = prediction(client.get("/api/v3/webhook/secret"))["secret"]
        wait_until(lambda: len(calls) == 1, 60, what=lambda: server.log[-4000:])
        server.log_with("webhook failed", timeout_s=60)
        server.kill()
        server.start()
        wait_until(lambda: len(calls) == 2, 120, what=lambda: server.log[-4000:])
        log = server.log_with("webhook delivered", timeout_s=60)
        polled = server.get(task["id"])
    assert [call.id for call in calls] == [task["id"]] * 2
    assert all(is_signed(call, secret) for call in calls)
    assert polled["status"] == "completed" and len(polled["outputs"]) == 1
    assert all(json.loads(call.body) == polled for call in calls)
    assert "s3cret" not in log and secret not in log
