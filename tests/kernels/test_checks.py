"""Checks run once for calls that look alike, and again for any that does not."""

import pytest
import torch

from redux_kernels import checks


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(checks, "_passed", set())
    return []


def test_calls_that_look_alike_are_checked_once(calls):
    for _ in range(3):
        checks.once(lambda *given: calls.append(given), torch.randn(2, 3), 1)
    assert len(calls) == 3  # three functions
    calls.clear()

    def check(*given):
        calls.append(given)

    for _ in range(3):
        checks.once(check, torch.randn(2, 3), [torch.randn(4)], 1, None)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "other",
    [
        (torch.zeros(3, 2), 1),
        (torch.zeros(3, 2).mT, 1),
        (torch.zeros(2, 3, dtype=torch.bfloat16), 1),
        (torch.zeros(2, 3, device="meta"), 1),
        (torch.zeros(2, 3), 2),
        (None, 1),
        ([torch.zeros(2, 3)], 1),
    ],
)
def test_what_looks_different_is_checked_again(calls, other):
    def check(*given):
        calls.append(given)

    checks.once(check, torch.zeros(2, 3), 1)
    checks.once(check, *other)
    assert len(calls) == 2


def test_what_fails_is_refused_every_time(calls):
    for _ in range(2):
        with pytest.raises(ValueError, match="x must be bfloat16"):
            checks.once(checks.check_float, "x", torch.zeros(1, dtype=torch.int32))


def test_no_more_is_remembered_than_fits(calls, monkeypatch):
    monkeypatch.setattr(checks, "MOST_PASSED", 3)
    for size in range(8):
        checks.once(checks.check_float, "x", torch.zeros(size))
        assert len(checks._passed) <= 3
