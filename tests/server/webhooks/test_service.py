"""Webhooks over the API: asking for one, the secret, and the whole way to a receiver."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import OperationalError

from e2e.live import wait_until
from redux_server.api import housekeeping
from redux_server.api.services import Services
from redux_server.cli.serve import check
from redux_server.database.tables import tasks, webhooks
from redux_server.settings import ServerSettings, UsageError
from redux_server.tasks.task import NewTask, Outcome, Status
from redux_server.webhooks.callback import Callback
from server.in_process import Api, end_next
from server.receiver import Received, is_signed, receiving

V3 = "/api/v3/wavespeed-ai/flux-pro-redux"
V2 = "/api/v2/wavespeed-ai/flux-pro-redux"
URL = {"image": "https://example.com/a.png"}
HOOK = "https://hooks.example/x?k=1"


def hook_of(api: Api, task_id: str) -> Callback | None:
    engine = api.services.webhooks.database
    with engine.connect() as db:
        stored = db.scalar(select(tasks.c.webhook_url).where(tasks.c.id == task_id))
    return Callback.parse(stored) if stored else None


# --- asking for one -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [V2, V3])
@pytest.mark.parametrize(
    ("query", "body"),
    [
        ({"webhook": HOOK}, {}),
        ({}, {"webhook_url": HOOK}),
        ({}, {"webhook": HOOK}),
        ({"webhook": HOOK}, {"webhook_url": HOOK}),
        ({"webhook": HOOK}, {"webhook_url": None, "webhook": ""}),
    ],
)
def test_webhook_is_named_in_the_query_or_in_the_body(
    api: Api, path: str, query: dict[str, str], body: dict[str, Any]
) -> None:
    response = api.post(path, json={**URL, **body}, params=query)
    assert response.status_code == 200
    data = response.json()["data"]
    assert hook_of(api, data["id"]) == Callback(HOOK, "http://test/")
    assert not {"webhook", "webhook_url"} & set(data["input"])


@pytest.mark.parametrize(("query", "body"), [({}, {}), ({"webhook": ""}, {"webhook_url": None})])
def test_no_webhook_is_asked_for(api: Api, query: dict[str, str], body: dict[str, Any]) -> None:
    response = api.post(V3, json={**URL, **body}, params=query)
    assert response.status_code == 200
    assert hook_of(api, response.json()["data"]["id"]) is None


@pytest.mark.parametrize(
    ("query", "body", "words"),
    [
        ({"webhook": "http://hooks.example/"}, {}, "must start with https://"),
        ({"webhook": "hooks.example"}, {}, "complete URL that starts with https://"),
        ({"webhook": "https://169.254.169.254/"}, {}, "--webhook-allow"),
        ({}, {"webhook_url": "https://u:p@h.example/"}, "user name"),
        ({"webhook": HOOK}, {"webhook_url": "https://other.example/"}, "different URLs"),
    ],
)
def test_webhook_that_cannot_be_used_is_a_400_and_starts_nothing(
    api: Api, query: dict[str, str], body: dict[str, Any], words: str
) -> None:
    response = api.post(V3, json={**URL, **body}, params=query)
    assert response.status_code == 400
    assert words in response.json()["message"]
    assert api.services.store.queue_state().waiting == 0


def test_base64_output_and_a_webhook_exclude_each_other_in_the_hosted_words(api: Api) -> None:
    response = api.post(V3, json={**URL, "enable_base64_output": True}, params={"webhook": HOOK})
    assert response.status_code == 400
    assert response.json()["error"] == (
        "webhook callback does not support base64 output, please use the normal API to use "
        "base64 output"
    )
    usual = {**URL, "enable_base64_output": False, "webhook_url": HOOK}
    assert api.post(V3, json=usual).status_code == 200


def test_idempotency_key_goes_with_its_webhook(api: Api) -> None:
    def submit(hook: str) -> Any:
        headers = {"Idempotency-Key": "once"}
        return api.post(V3, json=URL, params={"webhook": hook}, headers=headers)

    first = submit(HOOK)
    assert submit(HOOK).json()["data"]["id"] == first.json()["data"]["id"]
    assert submit("https://other.example/").status_code == 409


def test_allow_list_with_an_error_is_refused_at_the_start(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match=r"--webhook-allow: '10\.0\.0\.1/8'"):
        check(ServerSettings(data_dir=tmp_path, webhook_allow="10.0.0.1/8"))


# --- the secret -----------------------------------------------------------------------------------


def test_each_key_reads_its_own_secret(api: Api) -> None:
    path = "/api/v3/webhook/secret"
    answer = api.get(path)
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
    body = answer.json()
    assert (body["code"], body["message"]) == (200, "success")
    assert body["data"]["secret"].startswith("whsec_")
    assert api.get(path).json() == body
    other = api.services.keys.create("other")
    assert api.get(path, key=other).json()["data"]["secret"] != body["data"]["secret"]
    assert api.get(path, key="").status_code == 401


def test_secret_is_a_503_while_the_database_is_away(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> str:
        raise OperationalError("SELECT", {}, Exception("gone"))

    monkeypatch.setattr("redux_server.webhooks.service.webhook_secret", away)
    assert api.get("/api/v3/webhook/secret").status_code == 503


def test_secret_and_webhook_parameter_are_in_the_openapi_document(api: Api) -> None:
    document = api.get("/openapi.json", key="").json()
    parameters = document["paths"][V3]["post"]["parameters"]
    assert ("webhook", "query") in {(each["name"], each["in"]) for each in parameters}
    operation = document["paths"]["/api/v3/webhook/secret"]["get"]
    assert operation["security"] == [{"key": []}]
    assert set(operation["responses"]) == {"200", "401", "503"}


# --- the whole way --------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["completed", "failed"])
def test_receiver_is_told_what_a_poll_says(build_api: Callable[..., Api], ends: str) -> None:
    api = build_api(webhook_allow="127.0.0.1:*")
    calls: list[Received] = []
    outcome = (
        Outcome(Status.COMPLETED, ["x/1/0.png"], [False], [7])
        if ends == "completed"
        else Outcome.failure(1402, "Failed to download image from the provided URL.")
    )
    with receiving(lambda call: calls.append(call) or 200) as port:
        hook = f"http://127.0.0.1:{port}/hook"
        submitted = api.post(V3, json=URL, params={"webhook": hook}).json()["data"]
        assert not calls
        end_next(api.services.store, outcome)
        wait_until(lambda: len(calls) == 1, 60)
        outbox = api.services.webhooks.outbox
        wait_until(lambda: outbox.count_open() == 0, 60)
    polled = api.get(f"/api/v3/predictions/{submitted['id']}/result").json()["data"]
    (call,) = calls
    assert json.loads(call.body) == polled
    assert polled["status"] == ends and call.id == submitted["id"]
    assert all(url.startswith("http://test/files/") for url in polled["outputs"])
    assert len(polled["outputs"]) == (ends == "completed")
    secret = api.get("/api/v3/webhook/secret").json()["data"]["secret"]
    assert is_signed(call, secret)


def test_urls_told_start_with_the_public_url_where_one_is_set(
    build_api: Callable[..., Api],
) -> None:
    api = build_api(webhook_allow="127.0.0.1:*", public_url="https://flux.example/")
    calls: list[Received] = []
    with receiving(lambda call: calls.append(call) or 200) as port:
        api.post(V3, json={**URL, "webhook_url": f"http://127.0.0.1:{port}/"})
        end_next(api.services.store, Outcome(Status.COMPLETED, ["x/1/0.png"], [False], [7]))
        wait_until(lambda: len(calls) == 1, 60)
    told = json.loads(calls[0].body)
    assert told["urls"]["get"].startswith("https://flux.example/api/v3/predictions/")
    assert told["outputs"][0].startswith("https://flux.example/files/")


def test_metrics_say_how_many_wait(build_services: Callable[..., Services]) -> None:
    services = build_services()
    readings = housekeeping.gauges(services)
    names = {name: value for (name, _), value in readings.items()}
    assert names["num_webhooks_waiting"] == 0


def test_sweep_spares_a_task_until_its_webhook_is_delivered(
    build_services: Callable[..., Services],
) -> None:
    services = build_services(retention_hours=1)
    store, outbox = services.store, services.webhooks.outbox
    new = NewTask("k", "m", {}, webhook_url=Callback(HOOK, "http://test/").stored())
    store.accept([new], max_open=9)
    assert end_next(store, Outcome(Status.COMPLETED))
    long_ago = time.time() - 7200
    with services.webhooks.database.begin() as db:
        db.execute(update(tasks).values(finished_at=long_ago))
        db.execute(update(webhooks).values(created_at=long_ago))
    assert housekeeping.sweep(services) == 0
    assert store.get([new.id]) != [None]
    (delivery,) = outbox.claim(outbox.due(9))
    outbox.delivered(delivery)
    assert housekeeping.sweep(services) == 1
    with services.webhooks.database.connect() as db:
        assert db.execute(select(webhooks)).all() == []
