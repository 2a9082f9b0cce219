"""What may be asked for of the transformer's dtype."""

import pytest

from redux_pipelines.fp8 import self_test
from redux_pipelines.loading.load import load_pipeline


def test_fp8_that_cannot_run_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(self_test, "refusal", lambda *_: "the self-test of fp8 failed: it rains")
    with pytest.raises(ValueError, match=r"'fp8' cannot run on cpu: .* it rains"):
        load_pipeline(model="tiny", device="cpu", transformer_dtype="fp8")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"transformer_dtype": "int4"}, "transformer_dtype='int4' is not one of auto, same, fp8"),
        ({"transformer_dtype": "fp8", "backend": "diffusers"}, "needs the engine backend"),
    ],
    ids=str,
)
def test_other_wishes_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        load_pipeline(model="tiny", device="cpu", **options)
