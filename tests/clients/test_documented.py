"""What docs/internals/compatibility.md says to write for each client is run as it stands."""

import json
import re
from collections.abc import Callable

import pytest

from clients import roster
from clients.document import Block, sections
from clients.mcp_stdio import McpServer
from clients.trial import MODEL, Client, Trial, open_picture
from e2e.picture_site import PICTURES

CLIENTS = {
    "Python: wavespeed": (roster.PYTHON, roster.PYTHON_1),
    "Python: wavespeed 0.0.5": (roster.PYTHON_0,),
    "JavaScript: wavespeed": (roster.JAVASCRIPT, roster.JAVASCRIPT_0_2),
    "LangChain: langchain-wavespeed": (roster.LANGCHAIN,),
    "LlamaIndex: llama-index-tools-wavespeed": (roster.LLAMA_INDEX,),
    "Langflow: lfx-wavespeed": (roster.LANGFLOW,),
    "Hugging Face: huggingface_hub": (roster.HUB,),
    "MCP: @wavespeed/mcp": (roster.MCP_NODE,),
    "MCP: wavespeed-mcp": (roster.MCP_PYTHON,),
    "Command line: @wavespeed/cli": (roster.CLI,),
    "Command line: wavespeedai-skills": (roster.SKILLS,),
}
CASES = [
    pytest.param(client, block, id=f"{client.pins}-{number}")
    for heading, clients in CLIENTS.items()
    for client in clients
    for number, block in enumerate(sections()[heading])
]


def test_every_client_of_the_document_is_run() -> None:
    assert set(sections()) == set(CLIENTS)


@pytest.mark.clients
@pytest.mark.parametrize(("client", "block"), CASES)
def test_documented(trial: Callable[..., Trial], client: Client, block: Block) -> None:
    user = trial(client, "as documented")
    (user.home / "photo.jpg").write_bytes(PICTURES["/icon.png"])
    code = block.here(user.live.base_url, user.key, f"{user.site}/icon.png")
    if block.language == "json":
        check_mcp_configuration(user, code)
        return
    sandbox = user.sandbox()
    saved = user.home / "out.png"
    saved.unlink(missing_ok=True)
    commands = {"python": [sandbox.client.python, "-c"], "js": ["node", "-e"], "sh": ["sh", "-ec"]}
    printed = sandbox.run(*commands[block.language], code).stdout
    places = re.findall(r"http://127[^\s\"']+/files/[^\s\"']+/0\.png", printed)
    assert places or saved.exists(), printed
    assert open_picture(places[-1] if places else str(saved)).size == (512, 512)
    assert sandbox.left_loopback == []


def check_mcp_configuration(user: Trial, text: str) -> None:
    """The variables must be all that the server needs to be told."""
    (entry,) = json.loads(text)["mcpServers"].values()
    image = f"{user.site}/icon.png"
    with McpServer(user.sandbox(**entry["env"]), "wavespeed-mcp") as server:
        if "run_model" in server.tools():
            said = server.call("run_model", model=MODEL, input={"image": image}).json["outputs"]
        else:
            wanted = {"image": image, "images": [], "prompt": "a fox"}
            said = server.call("image_to_image", **wanted).json["urls"]
    assert open_picture(said[0]).size == (1024, 1024)
