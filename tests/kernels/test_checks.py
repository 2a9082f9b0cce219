"""Checks run once for calls that look alike, and again for any that does not."""

import threading

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


def look(*tensors):
    for each in tensors:
        checks.once(checks.check_float, "x", each)


@pytest.fixture
def looked_up(monkeypatch):
    """What is asked of the calls that have passed: nothing where they are not looked at."""

    class Passed(set):
        def __contains__(self, key):
            asked.append(key)
            return super().__contains__(key)

    asked = []
    monkeypatch.setattr(checks, "_passed", Passed())
    return asked


def test_a_computation_that_passed_is_not_looked_at_again(looked_up):
    passed, x = set(), torch.zeros(2, 3)
    for asked in (1, 1, 1):
        with checks.once_for(passed, x):
            look(x)
        assert len(looked_up) == asked
    look(x)
    assert len(looked_up) == 2  # outside


def test_a_computation_that_starts_from_other_tensors_is_looked_at(looked_up):
    passed = set()
    starts = [(torch.zeros(2, 3),), (torch.zeros(3, 2),), (torch.zeros(3, 2).mT,),
              (torch.zeros(2, 3, dtype=torch.bfloat16),), (torch.zeros(2, 3, device="meta"),),
              (torch.zeros(2, 3), torch.zeros(1))]  # fmt: skip
    for index, tensors in enumerate(starts, 1):
        with checks.once_for(passed, *tensors):
            look(torch.zeros(1))
        assert len(looked_up) == index
    with checks.once_for(set(), *starts[0]):  # another computation
        look(torch.zeros(1))
    assert len(looked_up) == len(starts) + 1


def test_a_computation_that_failed_is_refused_again():
    passed, whole = set(), torch.zeros(1, dtype=torch.int32)
    for _ in range(2):
        with (
            pytest.raises(ValueError, match="x must be bfloat16"),
            checks.once_for(passed, whole),
        ):
            look(whole)
    with pytest.raises(ValueError, match="x must be bfloat16"):
        look(whole)


def test_a_computation_within_one_that_passed_ends_before_it(looked_up):
    passed, x = set(), torch.zeros(1)
    with checks.once_for(passed, x):
        look(x)
    with checks.once_for(passed, x):
        with checks.once_for(set(), x):
            look(x)
        look(x)
    assert len(looked_up) == 1


def test_another_thread_checks_what_it_is_given(looked_up):
    passed, x = set(), torch.zeros(1)
    with checks.once_for(passed, x):
        look(x)
    with checks.once_for(passed, x):
        other = threading.Thread(target=look, args=(x,))
        other.start()
        other.join()
    assert len(looked_up) == 2
