"""The command line in an environment that sets nothing of ours."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("FLUX_REDUX_"):
            monkeypatch.delenv(name)
