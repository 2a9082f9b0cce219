"""What came of a client at each mutation, held against the table."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import pytest

from contract.double import OUTPUT, Double
from contract.mutations import Brings, noticed_by, unnoticed_by

Answer = dict[str, Any]  # of drivers: {"value": outputs} or {"error": text}
Ask = Callable[[str, str], Answer]  # of a client and a mutation
AllAnswers = Callable[[str], dict[str, Answer]]  # of a client, by mutation


def noticed(*clients: str) -> pytest.MarkDecorator:
    """Parametrize over what each must notice: ``client``, ``mutation``, ``says``."""
    return _cases("says", clients, noticed_by)


def unnoticed(*clients: str) -> pytest.MarkDecorator:
    """Parametrize over what each does not, and the whole: ``client``, ``mutation``, ``brings``."""
    return _cases("brings", clients, unnoticed_by)


def _cases(
    expected: str, clients: Sequence[str], by: Callable[[str], Mapping[str, Any]]
) -> pytest.MarkDecorator:
    cases = [
        pytest.param(client, mutation, value, id=f"{client}, {mutation}")
        for client in clients
        for mutation, value in by(client).items()
    ]
    return pytest.mark.parametrize(("client", "mutation", expected), cases)


def attempt(call: Callable[[], Any]) -> Answer:
    """The answer that a driver would write."""
    try:
        return {"value": call()}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def complaint(answer: Answer) -> str:
    """What the user is told; empty if nothing."""
    return str(answer.get("error", ""))


def brought(double: Double, mutation: str, answer: Answer) -> Brings | None:
    """What the user got without being told anything; None if it is none of what there is."""
    outputs = answer.get("value")
    if outputs == []:
        return Brings.NOTHING
    if not outputs or len(outputs) != 1 or not urlsplit(outputs[0]).path.endswith(OUTPUT):
        return None
    is_usable = outputs[0].startswith(f"{double.url(mutation)}/files/")
    return Brings.PICTURE if is_usable else Brings.UNUSABLE
