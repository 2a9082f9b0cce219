"""Official tools for agents and flows, all of which call the Python SDK: LangChain and others."""

from collections.abc import Callable

import pytest

from clients.roster import LANGCHAIN, LANGFLOW, LLAMA_INDEX
from clients.trial import MODEL, Client, Trial

pytestmark = pytest.mark.clients


@pytest.mark.parametrize(
    "case", ["run", "own client", "upload", "bad key", "bad parameter", "dead URL"]
)
def test_langchain(trial: Callable[..., Trial], case: str) -> None:
    trial(LANGCHAIN, case).check(case)


@pytest.mark.parametrize(
    "case", ["run", "tool", "get prediction", "bad key", "bad parameter", "dead URL"]
)
def test_llama_index(trial: Callable[..., Trial], case: str) -> None:
    trial(LLAMA_INDEX, case).check(case)


@pytest.mark.parametrize("client", [LANGCHAIN, LLAMA_INDEX], ids=lambda client: client.pins)
def test_tool_that_cannot_send_a_picture_is_told_that_one_is_needed(
    trial: Callable[..., Trial], client: Client
) -> None:
    answer = trial(client, "no picture").answer("no picture")
    assert "image is required" in answer["error"]


@pytest.mark.parametrize("case", ["run", "bad key", "bad parameter", "dead URL"])
def test_langflow(trial: Callable[..., Trial], case: str) -> None:
    trial(LANGFLOW, case).check(case)


def test_langflow_lists_our_model_among_those_that_make_pictures(
    trial: Callable[..., Trial],
) -> None:
    assert MODEL in trial(LANGFLOW, "models").answer("models")["value"]
