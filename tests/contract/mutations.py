"""What is spoiled, and what each client makes of it.

A client that the contract names must notice. The Python clients are in the rows that name them. The
JavaScript clients and ComfyUI's node are in every row: a row also says what they do not notice, as
tried here, so that nobody takes their silence for a promise.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from urllib.parse import urlsplit

from contract.double import Mutation, with_added, with_value, without

SDK, FIRST_SDK, HUB = "wavespeed 2.0.5", "wavespeed 0.0.5", "huggingface_hub 2.4.0"
MCP_PYTHON = "wavespeed-mcp 0.1.27"
JS, JS_0_2 = "npm wavespeed 0.3.2", "npm wavespeed 0.2.3"
# The command line runs tasks with the SDK 0.2.3 and shows them by requests of its own.
CLI_RUN, CLI_SHOW = "@wavespeed/cli 0.2.2 run", "@wavespeed/cli 0.2.2 show"
MCP = "@wavespeed/mcp 1.0.7"
COMFYUI = "ComfyUI node 6b1425b"
AI_SDK = "@wavespeed/ai-sdk-provider 0.1.3"
IN_EVERY_ROW = (JS, JS_0_2, CLI_RUN, CLI_SHOW, MCP, COMFYUI, AI_SDK)

TIMED_OUT = "timed out"
POLLS_ON = "polls on"  # without end; the test ends it
STILL = "still '"
INVALID = "Invalid JSON response"  # of a schema that the answer does not fit
WHOLE = Mutation("whole", lambda _: None)


class Brings(Enum):
    """What the user of a client that does not notice gets."""

    PICTURE = "the picture: the client does not read the field"
    NOTHING = "no picture, and no complaint: the client reads `outputs || []`"
    UNUSABLE = "the value as it is: the client hands it on"


@dataclass(frozen=True)
class Row:
    """``notices``: what a client says, a regular expression; ``silent``: what others bring."""

    mutation: Mutation
    notices: dict[str, str]
    silent: dict[str, Brings] = field(default_factory=dict)


def relative(url: str) -> str:
    return urlsplit(url).path


def all_relative(urls: list[str]) -> list[str]:
    return [relative(url) for url in urls]


def row(mutation: Mutation, notices: dict[str, str], **silent: tuple[str, ...]) -> Row:
    """A row; of those in every row, who is named nowhere brings the picture."""
    brings = {client: Brings[kind.upper()] for kind, who in silent.items() for client in who}
    unsaid = [each for each in IN_EVERY_ROW if each not in notices and each not in brings]
    return Row(mutation, notices, {**dict.fromkeys(unsaid, Brings.PICTURE), **brings})


def status(value: str, notices: dict[str, str]) -> Row:
    """A status that is not a task's: who knows only completed and failed polls on."""
    spoiled = Mutation(f"status {value}", with_value("data", "status", value=value))
    on = {JS_0_2: TIMED_OUT, CLI_RUN: POLLS_ON, COMFYUI: "Task timed out"}
    return row(spoiled, {**on, **notices})


# Of the code the AI SDK's provider asks no more than that it is a number.
ENVELOPE = {FIRST_SDK: "code", CLI_SHOW: "success", MCP: "success"}  # they show the message
NO_OUTPUTS = {FIRST_SDK: "outputs", HUB: "No output URL", COMFYUI: "No image URLs"}
TABLE: list[Row] = [
    row(Mutation("no id", without("data", "id")),
        {SDK: "No request ID", FIRST_SDK: r"'?id'?", JS: "No request ID", JS_0_2: "No request ID",
         CLI_RUN: "No request ID", MCP: "undefined", COMFYUI: "No request ID", AI_SDK: INVALID}),
    row(Mutation("outputs null", with_value("data", "outputs", value=None)),
        NO_OUTPUTS, nothing=(JS, JS_0_2, CLI_RUN, CLI_SHOW, MCP, AI_SDK)),
    row(Mutation("no outputs", without("data", "outputs")),
        NO_OUTPUTS, nothing=(JS, JS_0_2, CLI_RUN, CLI_SHOW, MCP, AI_SDK)),
    row(Mutation("outputs relative", with_value("data", "outputs", value=all_relative)),
        {HUB: "protocol|UnsupportedProtocol", CLI_RUN: "Failed to parse URL",
         CLI_SHOW: "Failed to parse URL", COMFYUI: "Invalid URL", AI_SDK: "Invalid URL"},
        unusable=(JS, JS_0_2, MCP)),
    row(Mutation("no urls.get", without("data", "urls", "get")),
        {FIRST_SDK: "get", HUB: "No result URL"}),
    row(Mutation("urls.get relative", with_value("data", "urls", "get", value=relative)),
        {FIRST_SDK: "protocol|UnsupportedProtocol|URL"}),
    row(Mutation("has_nsfw_contents null", with_value("data", "has_nsfw_contents", value=None)),
        {FIRST_SDK: "has_nsfw_contents"}),
    row(Mutation("error null", with_value("data", "error", value=None)),
        {FIRST_SDK: "error"}),
    row(Mutation("no executionTime", without("data", "executionTime")),
        {FIRST_SDK: "executionTime"}),
    row(Mutation("executionTime null", with_value("data", "executionTime", value=None)),
        {FIRST_SDK: "executionTime"}),
    row(Mutation("executionTime float", with_value("data", "executionTime", value=12.5)),
        {FIRST_SDK: "executionTime"}),
    row(Mutation("a time null", with_value("data", "timings", "inference", value=None)),
        {AI_SDK: INVALID}),
    row(Mutation("a time in words", with_value("data", "timings", "inference", value="12 ms")),
        {AI_SDK: INVALID}),
    status("succeeded", {SDK: TIMED_OUT, HUB: "Unknown status: succeeded",
                         JS: TIMED_OUT, MCP: "Still succeeded after the wait limit",
                         AI_SDK: STILL}),
    status("cancelled", {SDK: "cancelled", HUB: "Unknown status: cancelled",
                         JS: "Task cancelled", MCP: "Prediction cancelled",
                         AI_SDK: "prediction cancelled"}),
    status("timeout", {SDK: "timeout", HUB: "Unknown status: timeout",
                       JS: "Task timeout", MCP: "Prediction timeout",
                       AI_SDK: "prediction timeout"}),
    status("deleted", {SDK: "deleted", HUB: "Unknown status: deleted",
                       JS: "Task deleted", MCP: "Prediction deleted",
                       AI_SDK: "prediction deleted"}),
    row(Mutation("HTTP 202", lambda _: None, status=202),
        {SDK: "HTTP 202", COMFYUI: "Error: success"}),
    row(Mutation("no code", without("code")),
        {**ENVELOPE, COMFYUI: "No request ID", AI_SDK: INVALID}),
    row(Mutation("code 0", with_value("code", value=0)),
        {**ENVELOPE, COMFYUI: "API Error: success"}),
    row(Mutation("error at the top", with_added("error", value=None)),
        {MCP_PYTHON: "API Error: None"}),
]  # fmt: skip


def noticed_by(client: str) -> dict[str, str]:
    """What ``client`` says to each mutation that it must notice."""
    return {each.mutation.name: each.notices[client] for each in TABLE if client in each.notices}


def unnoticed_by(client: str) -> dict[str, Brings]:
    """What ``client`` brings where it does not notice, the whole answer included."""
    silent = {each.mutation.name: each.silent[client] for each in TABLE if client in each.silent}
    return {WHOLE.name: Brings.PICTURE, **silent}


def mutations() -> Iterator[Mutation]:
    """All, and none."""
    yield WHOLE
    yield from (each.mutation for each in TABLE)
