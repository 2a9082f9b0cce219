"""Money and use: nothing costs anything, and clients that ask get an answer they can read."""

from typing import Any

import pytest
from sqlalchemy import Engine

from redux_server.parameters import MODELS
from redux_server.tasks.task import Status
from server.in_process import Api
from server.stored_tasks import NOON, fill

DAY = 86_400


def data(response: Any) -> Any:
    assert response.status_code == 200, response.text
    body = response.json()
    assert (body["code"], body["message"], set(body)) == (
        200,
        "success",
        {"code", "message", "data"},
    )
    return body["data"]


@pytest.mark.parametrize("path", ["/api/v3/balance", "/api/v3/account/balance"])
def test_balance_is_a_number_for_a_good_key_and_401_for_another(api: Api, path: str) -> None:
    assert data(api.get(path)) == {"balance": 0.0}
    assert api.get(path, key="frs_no").status_code == 401


@pytest.mark.parametrize("path", ["/api/v3/model/price", "/api/v3/model/pricing"])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_free(api: Api, path: str, model: str) -> None:
    price = data(api.post(path, json={"model_id": model, "inputs": {"num_images": 4}}))
    assert (price.pop("model_id"), price.pop("currency")) == (model, "USD")
    names = {"price", "discounted_price", "discount_rate", "unit_price"}
    assert price == dict.fromkeys(names, 0)
    assert data(api.post(path, json={"model_id": model, "inputs": None}))["price"] == 0


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model_id": "google/veo3"}, 404, MODELS[0]),
        ({}, 400, "model_id is required"),
        ({"model_id": 5}, 400, "model_id must be"),
        ({"model_id": MODELS[0], "inputs": []}, 400, "inputs must be an object"),
        ([], 400, "JSON object"),
    ],
)
def test_price_of_what_there_is_not(api: Api, body: Any, status: int, says: str) -> None:
    answer = api.post("/api/v3/model/price", json=body)
    assert answer.status_code == status
    assert says in answer.json()["message"]


# --- billings -------------------------------------------------------------------------------------


def search(api: Api, **body: Any) -> Any:
    return data(api.post("/api/v3/billings/search", json={"page": 1, "page_size": 10, **body}))


def test_what_a_task_has_cost_can_be_looked_up(api: Api, database: Engine, key_id: str) -> None:
    ids = fill(database, 3, key_id=key_id, status=Status.COMPLETED, queued_at=None)
    foreign = fill(database, 1, key_id="other")
    found = search(
        api,
        billing_type="deduct",
        prediction_uuids=[*foreign, ids[1], "x\x00y"],
        sort="created_at ASC",
    )
    assert (found["page"], found["total"], found["has_more"]) == (1, 1, False)
    (record,) = found["items"]
    assert (record["price"], record["billing_type"]) == (0, "deduct")
    assert record["created_at"] == record["updated_at"] == "2027-01-15T08:00:01.000Z"
    wanted = {"uuid": ids[1], "model_uuid": MODELS[0], "status": "completed"}
    assert record["prediction"] == wanted
    assert search(api, prediction_uuids=foreign)["items"] == []
    assert search(api, prediction_uuids=[])["items"] == []


def test_records_are_paged_and_filtered(api: Api, database: Engine, key_id: str) -> None:
    ids = fill(database, 5, key_id=key_id)

    def found(**body: Any) -> list[str]:
        return [item["uuid"] for item in search(api, **body)["items"]]

    assert found() == found(sort="created_at DESC") == ids[::-1]
    assert found(sort="created_at ASC") == ids
    page = search(api, page=2, page_size=2)
    assert (page["page"], page["total"], page["has_more"]) == (2, 5, True)
    assert search(api, page=3, page_size=2)["has_more"] is False
    ms = int(NOON * 1000)
    assert found(start_time=str(ms + 3000)) == found(start_time=ms + 3000) == ids[:2:-1]
    assert found(end_time="2027-01-15T08:00:01Z") == ids[:1]
    assert found(billing_type="topup") == found(model_uuid="google/veo3") == []
    for wrong in ({"page_size": 101}, {"start_time": "soon"}, {"start_time": 10**40},
                  {"prediction_uuids": "x"}, {"start_time": "9" * 5000}):  # fmt: skip
        assert api.post("/api/v3/billings/search", json=wrong).status_code == 400, wrong


# --- use ------------------------------------------------------------------------------------------


def usage(api: Api, start: str, end: str, **more: Any) -> Any:
    body = {"start_time": start, "end_time": end, **more}
    return data(api.post("/api/v3/user/usage_stats", json=body))


def test_tasks_are_counted_by_day_and_model(api: Api, database: Engine, key_id: str) -> None:
    done = {"status": Status.COMPLETED, "queued_at": None}
    fill(database, 2, key_id=key_id, **done)
    fill(database, 1, key_id=key_id, at=lambda _: NOON + DAY)
    fill(database, 3, key_id=key_id, at=lambda _: NOON + DAY, model=MODELS[1], **done)
    fill(database, 1, key_id=key_id, at=lambda _: NOON + 40 * DAY)
    fill(database, 9, key_id="other")
    found = usage(api, "2027-01-01T00:00:00Z", "2027-02-01T00:00:00Z")
    assert found["summary"] == {"total_cost": 0, "total_requests": 6, "success_requests": 5}
    assert [(day["date"], day["count"], day["amount"]) for day in found["daily_usage"]] == [
        ("2027-01-15", 2, 0),
        ("2027-01-16", 4, 0),
    ]
    models = {m["model_uuid"]: m["count"] for m in found["daily_usage"][1]["models"]}
    assert models == {MODELS[0]: 1, MODELS[1]: 3}
    by_model = {m["model_uuid"]: m for m in found["per_model_usage"]}
    assert by_model[MODELS[0]]["total_count"] == 3
    assert by_model[MODELS[0]]["last_used_date"] == "2027-01-16"
    assert by_model[MODELS[1]]["total_cost"] == 0
    only = usage(api, "2027-01-01T00:00:00Z", "2027-02-01T00:00:00Z", model_uuid=MODELS[1])
    assert only["summary"]["total_requests"] == 3
    part = usage(api, "2027-01-15T08:00:01Z", "2027-01-16T00:00:00Z")
    assert part["summary"]["total_requests"] == 1
    assert usage(api, "0001-01-01T00:00:00Z", "0001-01-02T00:00:00Z")["daily_usage"] == []


@pytest.mark.parametrize(
    ("start", "end"),
    [("2027-01-01", "2027-03-01"), ("2027-01-02", "2027-01-01"), ("", "2027-01-01"), (1, 2)],
)
def test_time_that_cannot_be_counted_over_is_a_400(api: Api, start: Any, end: Any) -> None:
    body = {"start_time": start, "end_time": end}
    answer = api.post("/api/v3/user/usage_stats", json=body)
    assert answer.status_code == 400
    assert "time" in answer.json()["message"]
