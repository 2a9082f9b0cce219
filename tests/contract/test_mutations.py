"""Every field that the contract calls load-bearing is spoiled once: the client named must notice.

So a client test that passes says that the field is there and right, and not that nobody looks. Here
are the official SDKs and huggingface_hub; the rest is in test_mutations_of_others.
"""

import re
from typing import Any

import pytest
import wavespeed
from huggingface_hub import InferenceClient
from huggingface_hub.hf_api import InferenceProviderMapping
from huggingface_hub.inference._providers import PROVIDERS
from huggingface_hub.inference._providers._common import HARDCODED_MODEL_INFERENCE_MAPPING

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
from contract.mutations import HUB, JS, SDK, TIMED_OUT, Brings, noticed_by
from redux_server.parameters import MODELS

HUB_MODEL = "black-forest-labs/FLUX.1-Redux-dev"
IMAGE = "https://example.com/a.png"


# --- PyPI wavespeed -------------------------------------------------------------------------------


def run_sdk(double: Double, mutation: str) -> Any:
    client = wavespeed.Client(api_key=double.key, base_url=double.url(mutation), max_retries=0)
    patience_s = 2.0 if noticed_by(SDK).get(mutation) == TIMED_OUT else 30.0
    body = {"image": IMAGE}
    return client.run(MODELS[0], body, timeout=patience_s, poll_interval=0.05)["outputs"]


def test_sdk_takes_the_whole_answer(double: Double) -> None:
    (url,) = run_sdk(double, "whole")
    assert url.startswith(double.url("whole"))


# --- huggingface_hub ------------------------------------------------------------------------------


def run_hub(double: Double, monkeypatch: pytest.MonkeyPatch, mutation: str) -> Any:
    provider = PROVIDERS["wavespeed"]["image-to-image"]
    monkeypatch.setattr(provider, "base_url", double.url(mutation))
    monkeypatch.setattr("huggingface_hub.inference._providers.wavespeed._POLLING_INTERVAL", 0.05)
    mapping = InferenceProviderMapping(
        provider="wavespeed",
        hf_model_id=HUB_MODEL,
        providerId=MODELS[0],
        status="live",
        task="image-to-image",
    )
    monkeypatch.setitem(HARDCODED_MODEL_INFERENCE_MAPPING["wavespeed"], HUB_MODEL, mapping)
    client = InferenceClient(provider="wavespeed", api_key=double.key)
    return client.image_to_image(IMAGE, model=HUB_MODEL)


def test_hub_takes_the_whole_answer(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_hub(double, monkeypatch, "whole").size == (64, 48)


# --- these two, and npm wavespeed -----------------------------------------------------------------


@pytest.fixture
def ask(double: Double, driven: AllAnswers, monkeypatch: pytest.MonkeyPatch) -> Ask:
    def answer(client: str, mutation: str) -> Answer:
        if client == SDK:
            return attempt(lambda: run_sdk(double, mutation))
        if client == HUB:
            return attempt(lambda: run_hub(double, monkeypatch, mutation))
        return driven(client)[mutation]

    return answer


@noticed(SDK, HUB, JS)
def test_a_client_notices(ask: Ask, client: str, mutation: str, says: str) -> None:
    answer = ask(client, mutation)
    assert re.search(says, complaint(answer)), answer


@unnoticed(JS)
def test_a_client_does_not_notice(
    double: Double, ask: Ask, client: str, mutation: str, brings: Brings
) -> None:
    answer = ask(client, mutation)
    assert brought(double, mutation, answer) is brings, answer
