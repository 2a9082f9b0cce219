"""The OpenAPI document: what it says of parameters and paths."""

import json
import re

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
