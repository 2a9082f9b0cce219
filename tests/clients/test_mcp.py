"""The official MCP servers, npm @wavespeed/mcp and PyPI wavespeed-mcp, with a host's requests."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clients.mcp_stdio import McpServer
from clients.roster import MCP_NODE, MCP_PYTHON, MCP_SERVER
from clients.trial import MODEL, Trial, open_picture

pytestmark = pytest.mark.clients

STEPS = 28  # wavespeed-mcp sends neither steps nor size


def node(trial: Trial, **variables: str) -> McpServer:
    given = {"WAVESPEED_API_KEY": trial.key, "WAVESPEED_BASE_URL": trial.live.base_url}
    return McpServer(trial.sandbox(**{**given, **variables}), "wavespeed-mcp")


def python(trial: Trial, **variables: str) -> McpServer:
    given = {
        "WAVESPEED_API_KEY": trial.key,
        "WAVESPEED_API_HOST": trial.live.base_url,
        "WAVESPEED_API_IMAGE_TO_IMAGE_ENDPOINT": f"/{MODEL}",
        "WAVESPEED_MCP_BASE_PATH": str(trial.home),
    }
    return McpServer(trial.sandbox(**{**given, **variables}), "wavespeed-mcp")


# --- npm @wavespeed/mcp ---------------------------------------------------------------------------


def test_node_runs_a_model(trial: Callable[..., Trial]) -> None:
    user = trial(MCP_NODE, "run")
    with node(user) as server:
        assert server.info["serverInfo"]["version"] == MCP_NODE.version
        done = server.call("run_model", model=MODEL, input=user.body).json
    assert done["status"] == "completed"
    user.check_picture(done["outputs"][0])
    assert user.sandbox().left_loopback == []


def test_node_uploads_a_local_file_named_in_the_input(trial: Callable[..., Trial]) -> None:
    user = trial(MCP_NODE, "upload")
    with node(user) as server:
        wanted = {**user.body, "image": "@./icon.png"}
        done = server.call("run_model", model=MODEL, input=wanted).json
        url = server.call("upload_file", path="./icon.png").json["url"]
    assert done["uploaded_files"] == 1
    user.check_picture(done["outputs"][0])
    assert open_picture(url).tobytes() == open_picture(str(user.picture)).tobytes()


@pytest.mark.parametrize(
    ("case", "changes"),
    [("bad key", {}), ("bad parameter", {"num_images": 5}), ("dead URL", {"image": "dead"})],
)
def test_node_tells_what_is_wrong(
    trial: Callable[..., Trial], case: str, changes: dict[str, Any]
) -> None:
    user = trial(MCP_NODE, case)
    if "image" in changes:
        changes = {"image": user.job()["dead"]}
    variables = {"WAVESPEED_API_KEY": "frs_not-a-key"} if case == "bad key" else {}
    with node(user, **variables) as server:
        said = server.call("run_model", model=MODEL, input={**user.body, **changes})
    assert said.is_error
    user.check_refusal(case, said.text)


def test_node_lists_models_with_what_they_take(trial: Callable[..., Trial]) -> None:
    user = trial(MCP_NODE, "models")
    with node(user) as server:
        listed = server.call("list_models", query="redux", refresh=True).json["models"]
        schema = server.call("get_model_schema", model=MODEL).json
    assert MODEL in [model["model_id"] for model in listed]
    assert {model["type"] for model in listed} == {"image-to-image"}
    assert schema["required"] == ["image"]
    assert {"image", "prompt", "size", "seed"} <= set(schema["properties"])
    assert set(schema["property_order"]) <= set(schema["properties"])


def test_node_asks_for_balance_and_price(trial: Callable[..., Trial]) -> None:
    user = trial(MCP_NODE, "balance, price")
    with node(user) as server:
        assert server.call("get_balance").json["balance"] >= 0
        price = server.call("get_price", model=MODEL, input=user.body).json
    assert price["model_id"] == MODEL
    assert price["price"] >= 0
    assert price["currency"] == "USD"


def test_node_finds_a_prediction_again(trial: Callable[..., Trial]) -> None:
    user = trial(MCP_NODE, "get prediction")
    with node(user) as server:
        begun = server.call("run_model", model=MODEL, input=user.body, wait_seconds=0).json
        user.wait(begun["id"])
        found = server.call("get_prediction", id=begun["id"]).json
    assert found["status"] == "completed"
    user.check_picture(found["outputs"][0])


# --- PyPI wavespeed-mcp ---------------------------------------------------------------------------


def check_mcp_picture(trial: Trial, image: Image.Image, prompt: str) -> None:
    """The picture of a tool that sends no seed: its own metadata say which was used."""
    assert (image.format, image.size, image.info["Steps"]) == ("PNG", (1024, 1024), str(STEPS))
    wanted = {"image": f"{trial.site}/icon.png", "prompt": prompt, "seed": int(image.info["Seed"])}
    assert image.tobytes() == trial.reference.pixels(wanted)


def call_python(trial: Trial, mode: str = "url", **changes: Any) -> dict[str, Any]:
    arguments = {"image": f"{trial.site}/icon.png", "images": [], "prompt": "a fox", **changes}
    with python(trial, WAVESPEED_API_RESOURCE_MODE=mode) as server:
        said = server.call("image_to_image", **arguments)
    result: dict[str, Any] = said.json
    return result


def test_python_runs_a_model(trial: Callable[..., Trial]) -> None:
    user = trial(MCP_PYTHON, "run")
    found = call_python(user)
    assert found["status"] == "success", found
    check_mcp_picture(user, open_picture(found["urls"][0]), "a fox")
    assert user.sandbox().left_loopback == []


def test_python_sends_a_local_file_inline_and_saves_the_result(trial: Callable[..., Trial]) -> None:
    user = trial(MCP_PYTHON, "local file")
    found = call_python(user, "local", image=str(user.picture), output_directory="pictures")
    (saved,) = found["local_files"]
    assert Path(saved["path"]).parent == user.home / "pictures"
    check_mcp_picture(user, open_picture(saved["path"]), "a fox")


def test_python_brings_the_result_as_base64(trial: Callable[..., Trial]) -> None:
    user = trial(MCP_PYTHON, "base64")
    (found,) = call_python(user, "base64")["base64"]
    assert found["mime_type"] == "image/png"
    image = Image.open(io.BytesIO(base64.b64decode(found["data"])))
    check_mcp_picture(user, image, "a fox")


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("bad key", "Authentication failed: 401"),
        ("bad parameter", r"guidance_scale must be .*from 1 to 20"),
        ("dead URL", r"could not be reached"),
    ],
)
def test_python_tells_what_is_wrong(trial: Callable[..., Trial], case: str, text: str) -> None:
    user = trial(MCP_PYTHON, case)
    changes: dict[str, Any] = {
        "bad key": {},
        "bad parameter": {"guidance_scale": 99},
        "dead URL": {"image": user.job()["dead"]},
    }[case]
    variables = {"WAVESPEED_API_KEY": "frs_not-a-key"} if case == "bad key" else {}
    arguments = {"image": f"{user.site}/icon.png", "images": [], "prompt": "a fox", **changes}
    with python(user, **variables) as server:
        found = json.loads(server.call("image_to_image", **arguments).text)
    assert found["status"] == "error"
    Trial.check_text(text, found["error"])


def test_python_tool_that_cannot_send_a_picture_is_told_that_one_is_needed(
    trial: Callable[..., Trial],
) -> None:
    user = trial(MCP_PYTHON, "no picture")
    with python(user) as server:
        said = server.call("text_to_image", prompt="a fox", model=MODEL, guidance_scale=3.5).text
    assert "image is required" in json.loads(said)["error"]


@pytest.mark.parametrize(("case", "status"), [("unknown model", "404"), ("bad key", "401")])
def test_server_for_other_models_shows_the_status(
    trial: Callable[..., Trial], case: str, status: str
) -> None:
    """Its models are constants, and so is its host; of a refusal it says no more than this."""
    user = trial(MCP_SERVER, case)
    key = user.key if case == "unknown model" else "frs_not-a-key"
    sandbox = user.sandbox(WAVESPEED_API_KEY=key)
    with McpServer(sandbox, sandbox.client.python, "-m", "wavespeed") as server:
        wanted = {"prompt": "a fox", "image": f"{user.site}/icon.png", "loras": []}
        assert f"{status} Client Error" in server.call("generate_image", **wanted).text
    assert sandbox.left_loopback == []
