"""SIGTERM under load: nobody is left without an answer, and nothing that was begun is lost."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from e2e.live import MODEL_PATH, LiveServer, a_picture, data_uri, prediction, wait_until
from e2e.restarted import RestartedServer

IMAGE = data_uri(a_picture())


def test_a_stopping_server_refuses_tasks_and_answers_polls_until_its_work_is_done(
    tmp_path: Path,
) -> None:
    body = {"image": IMAGE, "size": "512*512", "num_inference_steps": 50, "num_images": 2}
    body["enable_safety_checker"] = False
    server = RestartedServer(tmp_path / "data")
    with server, server.rows() as rows:
        begun, waiting = (server.submit(body)["id"] for _ in range(2))
        wait_until(lambda: rows()[begun].progress_step > 0, 30)
        with server.client() as client:
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: client.get("/readyz").status_code == 503, 10, every_s=0.02)
            refused = client.post(MODEL_PATH, json=body)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            assert "stopping" in refused.json()["message"]
            assert client.get("/livez").status_code == 200
            seen = prediction(client.get(f"/api/v3/predictions/{begun}/result"))
            assert seen["status"] in ("processing", "completed")
        assert server.process.wait(60) == 0
        assert (rows()[begun].status, rows()[begun].attempt) == ("completed", 1)
        # Given back, if it had been taken to have its picture ready; a state never goes back.
        assert rows()[waiting].status in ("created", "processing")
        assert rows()[waiting].lease_until is None
    assert server.log.count("stopping: no task is accepted any more") >= 1


@contextmanager
def hang_up_as(handler: signal.Handlers) -> Iterator[None]:
    """What children that are started here do at SIGHUP until they say otherwise."""
    former = signal.signal(signal.SIGHUP, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_closed_terminal_drains_as_sigterm_does(tmp_path: Path) -> None:
    body = {"image": IMAGE, "size": "512*512", "num_inference_steps": 30}
    server = RestartedServer(tmp_path / "data")
    with hang_up_as(signal.SIG_DFL):  # whoever runs the tests may have called nohup
        server.start()
    with ExitStack() as ending, server.rows() as rows:
        ending.callback(server.stop)
        begun = server.submit(body)["id"]
        wait_until(lambda: rows()[begun].progress_step > 0, 30)
        for pid in (*server.worker_pids(), server.process.pid):
            os.kill(pid, signal.SIGHUP)
        assert server.process.wait(60) == 0
        assert (rows()[begun].status, rows()[begun].attempt) == ("completed", 1)
    assert "stopping: no task is accepted any more" in server.log


def test_nohup_keeps_a_server_whose_terminal_closes(tmp_path: Path) -> None:
    server = LiveServer(tmp_path / "data")
    with hang_up_as(signal.SIG_IGN):  # as nohup does
        server.start()
    with server.client() as client:
        try:
            server.process.send_signal(signal.SIGHUP)
            assert client.get("/readyz").status_code == 200
        finally:
            assert server.stop() == 0


def test_a_second_signal_does_not_wait_for_the_answers(tmp_path: Path) -> None:
    body = {"image": IMAGE, "size": "512*512", "num_inference_steps": 50, "num_images": 4}
    server = LiveServer(tmp_path / "data", "--drain-timeout-s", "1", model="fake-slow")
    with server:
        begun = server.submit(body)["id"]
        wait_until(lambda: server.get(begun)["status"] == "processing", 30)
        began = time.monotonic()
        for _ in range(2):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        assert server.process.wait(30) == 0
        assert time.monotonic() - began < 15
