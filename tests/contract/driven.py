"""Clients in environments of their own: each is run at the address of each of its mutations."""

from dataclasses import dataclass
from pathlib import Path

from clients.environments import checkout, environment
from clients.sandbox import Sandbox
from contract.answers import Answer
from contract.double import Double
from contract.mutations import (
    AI_SDK,
    COMFYUI,
    FIRST_SDK,
    JS,
    JS_0_2,
    STILL,
    TIMED_OUT,
    noticed_by,
    unnoticed_by,
)
from redux_server.parameters import MODELS

PATIENCE_S = 3.0
WAITING = (TIMED_OUT, STILL)


@dataclass(frozen=True)
class Driven:
    """The pins of a client, the program that calls it, and its checkout if it is in no registry."""

    pins: str
    driver: str
    checkout: str = ""


DRIVEN = {
    FIRST_SDK: Driven("pypi-wavespeed-0.0.5", "spoiled_python_0.py"),
    JS: Driven("npm-wavespeed-0.3.2", "spoiled_js.cjs"),
    JS_0_2: Driven("npm-wavespeed-0.2.3", "spoiled_js.cjs"),
    COMFYUI: Driven("for-checkouts", "spoiled_comfyui.py", "wavespeed-comfyui"),
    AI_SDK: Driven("for-checkouts-node", "spoiled_ai_sdk.cjs", "ai-sdk-provider"),
}


def drive(double: Double, client: str, home: Path) -> dict[str, Answer]:
    """What came of ``client``, by mutation; skips the test where it cannot be had."""
    driven = DRIVEN[client]
    says = noticed_by(client)
    job = {
        "key": double.key,
        "model": MODELS[0],
        "body": {"image": "https://example.com/a.png"},
        "urls": {name: double.url(name) for name in [*says, *unnoticed_by(client)]},
        "impatient": {name: PATIENCE_S for name, text in says.items() if text in WAITING},
        "source": checkout(driven.checkout) if driven.checkout else "",
    }
    sandbox = Sandbox(environment(driven.pins), home)
    answers: dict[str, Answer] = sandbox.drive(driven.driver, job)
    assert sandbox.left_loopback == []
    return answers
