"""One double for all tests of this folder, and one run of each client that asks it all at once."""

from collections.abc import Iterator

import pytest

from contract.answers import AllAnswers, Answer
from contract.double import Double
from contract.driven import drive
from contract.mutations import mutations


@pytest.fixture(scope="session")
def double(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Double]:
    with Double(tmp_path_factory.mktemp("double"), list(mutations())) as server:
        yield server


@pytest.fixture(scope="session")
def driven(double: Double, tmp_path_factory: pytest.TempPathFactory) -> AllAnswers:
    """What came of a client at every address, from one process in an environment of its own."""
    known: dict[str, dict[str, Answer]] = {}

    def answers(client: str) -> dict[str, Answer]:
        if client not in known:
            known[client] = drive(double, client, tmp_path_factory.mktemp("driven"))
        return known[client]

    return answers
