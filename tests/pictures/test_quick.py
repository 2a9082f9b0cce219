"""A few pictures of the corpus in the quick tests, so that it cannot rot."""

import pytest

from pictures.check import ALLOWED, outcome
from pictures.corpus import QUICK, corpus


@pytest.mark.parametrize("name", QUICK)
def test_file_is_shown_or_refused_rightly(name: str) -> None:
    case = corpus()[name]
    assert outcome(case, case.make()) != ALLOWED


def test_corpus_is_large_and_of_every_format() -> None:
    families = {case.family for case in corpus().values()}
    assert len(corpus()) >= 600
    assert families >= {"png", "jpeg", "gif", "bmp", "webp", "tiff", "heic", "avif", "other"}
