"""Every picture of the corpus, decoded as the server does; run by make test-pictures.

The corpus is written from the formats' standards, with a second decoder's word on its own numbers.
"""

from collections.abc import Callable

import pytest

from pictures.case import Skip
from pictures.check import outcome, second_word
from pictures.corpus import corpus


@pytest.mark.pictures
@pytest.mark.parametrize("name", list(corpus()))
def test_file_is_shown_or_refused_rightly(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    record_property("picture", name)
    case = corpus()[name]
    try:
        made = case.make()
    except Skip as missing:
        pytest.skip(str(missing))
    record_property("second", second_word(made))
    record_property("outcome", outcome(case, made))
