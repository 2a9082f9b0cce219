"""The same for clients that are run by make test-clients only."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from clients.environments import environment
from clients.mcp_stdio import McpServer
from clients.sandbox import Sandbox
from contract.answers import (
    AllAnswers,
    Answer,
    Ask,
    attempt,
    brought,
    complaint,
    noticed,
    unnoticed,
)
from contract.double import Double
from contract.mutations import (
    AI_SDK,
    CLI_RUN,
    CLI_SHOW,
    COMFYUI,
    FIRST_SDK,
    JS_0_2,
    MCP,
    MCP_PYTHON,
    POLLS_ON,
    Brings,
    noticed_by,
)
from e2e.live import terminate, wait_until
from redux_server.parameters import MODELS

pytestmark = pytest.mark.clients

IMAGE = "https://example.com/a.png"


class Refused(Exception):
    """What the client said."""


# --- npm @wavespeed/cli ---------------------------------------------------------------------------


def cli(double: Double, home: Path, mutation: str) -> Sandbox:
    """Its user, who has told it of the server."""
    folder = home / ".config/wavespeed-nodejs"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"baseUrl": double.url(mutation)}))
    return Sandbox(environment("npm-wavespeed-cli"), home, {"WAVESPEED_API_KEY": double.key})


def saved(done: "subprocess.CompletedProcess[str]") -> Any:
    """The outputs of which each was saved."""
    said = json.loads(done.stdout)
    if done.returncode:
        raise Refused(said["error"])
    outputs = said["outputs"] or []
    if len(said["saved"]) != len(outputs):
        raise Refused(done.stderr)
    return outputs


def cli_run(double: Double, home: Path, mutation: str) -> Any:
    user = cli(double, home, mutation)
    command = ("wavespeed", "run", MODELS[0], "--input", f"image={IMAGE}", "--download", "--json")
    if noticed_by(CLI_RUN).get(mutation) != POLLS_ON:
        return saved(user.run(*command, must=False))
    process = subprocess.Popen(
        command, cwd=home, env=user.environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: double.polls[mutation] >= 3, 60)
        assert process.poll() is None, "it has ended"
    finally:
        terminate(process, 10)
    raise Refused(POLLS_ON)


def cli_show(double: Double, home: Path, mutation: str) -> Any:
    response = httpx.post(
        f"{double.url('whole')}/api/v3/{MODELS[0]}",
        json={"image": IMAGE},
        headers={"Authorization": f"Bearer {double.key}"},
    )
    task = response.json()["data"]["id"]
    user = cli(double, home, mutation)
    done = user.run("wavespeed", "show", task, "--download", "--json", must=False)
    said = json.loads(done.stdout)
    if done.returncode == 0:
        said.setdefault("outputs", [])
        done.stdout = json.dumps(said)
    return saved(done)


# --- npm @wavespeed/mcp and PyPI wavespeed-mcp ----------------------------------------------------


def mcp_node(double: Double, home: Path, mutation: str) -> Any:
    variables = {"WAVESPEED_API_KEY": double.key, "WAVESPEED_BASE_URL": double.url(mutation)}
    sandbox = Sandbox(environment("npm-wavespeed-mcp"), home, variables)
    with McpServer(sandbox, "wavespeed-mcp") as server:
        said = server.call("run_model", model=MODELS[0], input={"image": IMAGE}, wait_seconds=1)
    if said.is_error:
        raise Refused(said.text)
    return said.json["outputs"]


def mcp_python(double: Double, home: Path, mutation: str) -> Any:
    variables = {
        "WAVESPEED_API_KEY": double.key,
        "WAVESPEED_API_HOST": double.url(mutation),
        "WAVESPEED_API_IMAGE_TO_IMAGE_ENDPOINT": f"/{MODELS[0]}",
        "WAVESPEED_MCP_BASE_PATH": str(home),
        "WAVESPEED_API_RESOURCE_MODE": "url",
    }
    sandbox = Sandbox(environment("pypi-wavespeed-mcp"), home, variables)
    with McpServer(sandbox, "wavespeed-mcp") as server:
        said = server.call("image_to_image", image=IMAGE, images=[], prompt="a fox")
    found = json.loads(said.text)
    if found["status"] != "success":
        raise Refused(found["error"])
    return found["urls"]


# --- all of them ----------------------------------------------------------------------------------

CALLED: dict[str, Callable[[Double, Path, str], Any]] = {
    CLI_RUN: cli_run,
    CLI_SHOW: cli_show,
    MCP: mcp_node,
    MCP_PYTHON: mcp_python,
}
OTHERS = (FIRST_SDK, JS_0_2, COMFYUI, AI_SDK, *CALLED)


@pytest.fixture
def ask(double: Double, driven: AllAnswers, tmp_path: Path) -> Ask:
    def answer(client: str, mutation: str) -> Answer:
        if client in CALLED:
            return attempt(lambda: CALLED[client](double, tmp_path, mutation))
        return driven(client)[mutation]

    return answer


@noticed(*OTHERS)
def test_a_client_notices(ask: Ask, client: str, mutation: str, says: str) -> None:
    answer = ask(client, mutation)
    assert re.search(says, complaint(answer)), answer


@unnoticed(*OTHERS)
def test_a_client_does_not_notice(
    double: Double, ask: Ask, client: str, mutation: str, brings: Brings
) -> None:
    answer = ask(client, mutation)
    assert brought(double, mutation, answer) is brings, answer
