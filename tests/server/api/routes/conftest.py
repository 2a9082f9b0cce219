"""What tests of several routes share."""

import pytest

from server.in_process import Api


@pytest.fixture
def key_id(api: Api) -> str:
    """The id of the key that the API's calls are made with."""
    owner = api.services.keys.recognise(api.key)
    assert owner
    return owner
