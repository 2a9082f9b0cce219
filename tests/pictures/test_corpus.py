"""Every picture of the corpus, decoded as the server does; run by make test-pictures.

The corpus is written from the formats' standards, with a second decoder's word on its own numbers.
"""

import pytest

from pictures.case import Skip
from pictures.check import outcome, second_word
from pictures.corpus import corpus

pytestmark = pytest.mark.pictures


@pytest.mark.parametrize("name", list(corpus()))
def test_file_is_shown_or_refused_rightly(
    name: str, record_property: pytest.RecordProperty
) -> None:
    record_property("picture", name)
    try:
        record_property("outcome", outcome(corpus()[name]))
    except Skip as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("name", list(corpus()))
def test_second_decoder_agrees(name: str) -> None:
    case = corpus()[name]
    try:
        if not second_word(case):
            pytest.skip("no second decoder is asked")
    except Skip as missing:
        pytest.skip(str(missing))
