"""Clients that are in no registry: run from checkouts, where there are any, and never committed.

CLIENT_SOURCES names a folder of them; docs/internals/compatibility.md says what it may hold.
"""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from clients.roster import (
    AI_SDK,
    COMFYUI,
    COMFYUI_CATALOGUE,
    DESKTOP,
    DIFY,
    DIFY_TOOL,
    DISCORD,
    GO,
    JAVA,
    LITELLM,
    N8N_NODE,
    PHP,
)
from clients.trial import MODEL, MODEL_PATH, REFUSALS, Client, Trial
from e2e.live import LiveServer, prediction
from threaded import answering

pytestmark = pytest.mark.clients
Begin = Callable[[Client, str], Trial]
REFUSED = ("bad key", "bad parameter", "dead URL")
AHEAD = 4
"""Tasks of 4 s before the slow one: the Go client waits for 10 s, and asks six times at most."""


@pytest.mark.parametrize("case", ["run", "upload", *REFUSED])
def test_comfyui(trial: Begin, case: str) -> None:
    trial(COMFYUI, case).check(case)


@pytest.mark.parametrize("case", ["categories", "models", "parameters"])
def test_comfyui_reads_its_catalogue_at_the_other_host(trial: Begin, case: str) -> None:
    found = trial(COMFYUI_CATALOGUE, case).answer(case)["value"]
    expected = {
        "categories": ("image-to-image", lambda: found["image-to-image"] > 0),
        "models": (MODEL, lambda: True),
        "parameters": ("num_images", lambda: "image" in found),
    }
    name, holds = expected[case]
    assert name in found, found
    assert holds(), found


@pytest.mark.parametrize("case", ["run", *REFUSED])
def test_dify(trial: Begin, case: str) -> None:
    user = trial(DIFY, case)
    assert user.answer("balance") == {"value": None}
    user.check(case)


def test_dify_tool_is_told_that_a_picture_is_needed(trial: Begin) -> None:
    assert "image is required" in trial(DIFY_TOOL, "no picture").answer("no picture")["error"]


def test_dify_tool_is_told_that_its_key_is_bad(trial: Begin) -> None:
    trial(DIFY_TOOL, "bad key").check("bad key")


@pytest.mark.parametrize("case", ["run", "download", "generate image", *REFUSED])
def test_n8n(trial: Begin, case: str) -> None:
    trial(N8N_NODE, case).check(case)


@pytest.mark.parametrize("case", ["run", "upload", "sync", *REFUSED])
def test_desktop_app(trial: Begin, case: str) -> None:
    trial(DESKTOP, case).check(case)


def test_desktop_app_lists_models_balance_price_and_history(trial: Begin) -> None:
    user = trial(DESKTOP, "models, balance, price, history, delete")
    assert MODEL in user.answer("models")["value"]
    assert user.answer("balance")["value"] >= 0
    assert user.answer("price")["value"] >= 0
    assert {each["model"] for each in user.answer("history")["value"]} == {MODEL}
    assert user.answer("remove") == {"value": True}


@pytest.mark.parametrize("case", ["run", *REFUSED])
def test_discord_bot(trial: Begin, case: str) -> None:
    trial(DISCORD, case).check(case)


def test_discord_bot_lists_models_and_balance(trial: Begin) -> None:
    user = trial(DISCORD, "models, balance")
    assert MODEL in user.answer("models")["value"]
    assert user.answer("balance")["value"] >= 0
    user.check_text(REFUSALS["bad key"], user.answer("bad key, balance")["error"])


def test_discord_bot_is_told_that_a_picture_is_needed(trial: Begin) -> None:
    assert "image is required" in trial(DISCORD, "no picture").answer("no picture")["error"]


@pytest.mark.parametrize("case", ["run", "local file", *REFUSED])
def test_ai_sdk(trial: Begin, case: str) -> None:
    trial(AI_SDK, case).check(case)


@pytest.mark.parametrize("case", ["run", "no picture", *REFUSED])
def test_litellm(trial: Begin, case: str) -> None:
    if case == "no picture":
        assert "image is required" in trial(LITELLM, case).answer(case)["error"]
    else:
        trial(LITELLM, case).check(case)


@pytest.mark.parametrize("case", ["run", "module", "upload", "sync", *REFUSED])
def test_java(trial: Begin, case: str) -> None:
    trial(JAVA, case).check(case)


@pytest.mark.parametrize("case", ["run", "no throw", "upload", "sync", *REFUSED])
def test_go(trial: Begin, case: str) -> None:
    trial(GO, case).check(case)


def test_go_in_sync_mode_is_joined_to_the_task_it_left(
    trial: Begin, site: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """It gives up after 10 s, sync mode or not, and sends its request again, up to five times."""
    user = trial(GO, "sync over 10 s")
    body = {**user.body, "num_inference_steps": 50, "num_images": 4}
    folder = tmp_path_factory.mktemp("slow")
    with LiveServer(folder / "data", "--fetch-allow", "127.0.0.1:*", model="fake-slow") as slow:
        key = slow.create_key("go")
        with slow.client(key) as http:
            before = [prediction(http.post(MODEL_PATH, json=body))["id"] for _ in range(AHEAD)]
            job = {**user.job(slow.base_url), "key": key, "body": {**body, "seed": 8}}
            answers = user.sandbox().drive(GO.driver, {**job, "only": "sync"})
            listed = http.post("/api/v3/predictions", json={"page": 1, "page_size": 100})
            made = [each["id"] for each in listed.json()["data"]["items"]]
    assert len(answers["sync"]["value"]) == 4, answers
    assert answers["posts"]["value"] > 1, "it did not wait for longer than it does"
    assert len(set(made) - set(before)) == 1, made


@pytest.mark.parametrize("case", ["run", "upload", *REFUSED])
def test_php(trial: Begin, case: str) -> None:
    trial(PHP, case).check(case)


def test_php_lists_models_and_price(trial: Begin) -> None:
    user = trial(PHP, "models, price")
    assert MODEL in user.answer("models")["value"]
    assert user.answer("price")["value"] >= 0


def test_php_verifies_our_webhooks(trial: Begin) -> None:
    user = trial(PHP, "webhook")
    told: list[tuple[str, dict[str, str]]] = []
    arrived = threading.Event()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            told.append((self.rfile.read(length).decode(), dict(self.headers)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()
            arrived.set()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with (
        answering(ThreadingHTTPServer(("127.0.0.1", 0), Receiver)) as receiver,
        user.live.client(user.key) as http,
    ):
        where = {"webhook": f"http://127.0.0.1:{receiver.server_port}/told"}
        prediction(http.post(MODEL_PATH, params=where, json=user.body))
        assert arrived.wait(60)
        secret = http.get("/api/v3/webhook/secret").json()["data"]["secret"]
    (body, headers), *_ = told
    webhook = {"body": body, "headers": headers, "secret": secret}
    answers = user.sandbox().drive(PHP.driver, {**user.job(), "webhook": webhook})
    expected = {"as sent": True, "other body": False, "other secret": False, "late": False}
    assert answers["webhook"] == {"value": expected}
