"""The OpenAPI document: what it says of parameters and paths."""

import json
import re
from typing import Any

from e2e.live import LiveServer
from redux_server import __version__
from redux_server.parameters import PredictionRequest
from server.in_process import SUBMIT, Api


def test_openapi_describes_every_parameter(api: Api) -> None:
    document = api.get("/openapi.json", key="").json()
    operation = document["paths"][SUBMIT]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == set(PredictionRequest.model_fields)
    assert all(each["description"] for each in schema["properties"].values())
    assert schema["required"] == ["image"]
    steps, seed = schema["properties"]["num_inference_steps"], schema["properties"]["seed"]
    assert (steps["default"], steps["minimum"], steps["maximum"]) == (28, 1, 50)
    assert (seed["minimum"], seed["maximum"]) == (-1, 9_999_999_999)
    assert schema["properties"]["size"]["default"] == "1024*1024"


def test_openapi_is_well_formed(api: Api) -> None:
    text = api.get("/openapi.json", key="").text
    document = json.loads(text)
    assert document["openapi"].startswith("3.")
    assert document["info"]["version"] == __version__
    for reference in set(re.findall(r'"\$ref":\s*"#/([^"]+)"', text)):
        part = document
        for name in reference.split("/"):
            part = part[name]
    ids = []
    for path, methods in document["paths"].items():
        for operation in methods.values():
            ids.append(operation["operationId"])
            declared = {each["name"] for each in operation.get("parameters", ())}
            assert declared >= set(re.findall(r"{(\w+)}", path)), path
            assert operation["responses"]
    assert len(set(ids)) == len(ids)
    assert {SUBMIT, "/api/v2/wavespeed-ai/flux-pro-redux", "/readyz"} <= set(document["paths"])


def examples(document: dict[str, Any]) -> list[tuple[str, Any]]:
    """The path and the example of each operation that takes JSON."""
    found = []
    for path, methods in document["paths"].items():
        for operation in methods.values():
            content = operation.get("requestBody", {}).get("content", {})
            if "application/json" in content:
                found.append((path, content["application/json"]["example"]))
    return found


def test_every_example_is_answered_as_it_stands_and_submitted_ones_complete(
    live: LiveServer,
) -> None:
    with live.client() as client:
        given = examples(client.get("/openapi.json").json())
        assert len(given) >= 8
        submitted = []
        for path, example in given:
            answer = client.post(path, json=example)
            assert answer.status_code == 200, (path, answer.text)
            if path.endswith("/flux-pro-redux"):
                submitted.append(answer.json()["data"]["id"])
        assert len(submitted) == 2
    for task_id in submitted:
        assert live.wait(task_id)["status"] == "completed"
