"""What images cost, and from how many a day on a GPU of one's own pays."""

import pytest

from redux_server.bench.cost import break_even, cost_per_day, price_per_image, told
from redux_server.bench.target import Target

GPU = Target("ours", "http://127.0.0.1:1", gpu_hour=2.4)
PAID = Target("hosted", "https://h", price=0.025)


def test_the_price_of_a_gpu_is_shared_by_what_it_makes() -> None:
    assert price_per_image(PAID, 7.0) == 0.025
    assert price_per_image(GPU, 20.0) == pytest.approx(2.4 / 1200)
    assert price_per_image(GPU, None) is None
    assert price_per_image(Target("x", "http://127.0.0.1:1"), 20.0) is None


def test_break_even_is_where_both_cost_the_same() -> None:
    found = break_even(GPU, PAID, images_per_minute=20)
    count = found["images_per_day"]
    assert count == 2304  # 24 h x $2.40 / $0.025
    assert cost_per_day(GPU, count, 20) == pytest.approx(cost_per_day(PAID, count, None))
    assert (cost_per_day(GPU, count - 100, 20) or 0) > (cost_per_day(PAID, count - 100, None) or 0)


def test_a_gpu_that_is_too_slow_never_pays() -> None:
    assert break_even(GPU, PAID, images_per_minute=1)["images_per_day"] is None
    for count in (100, 1440, 2304, 10_000, 100_000):
        assert (cost_per_day(GPU, count, 1) or 0) > (cost_per_day(PAID, count, None) or 0)


def test_more_images_than_a_gpu_makes_take_another() -> None:
    assert cost_per_day(GPU, 28_800, 20) == pytest.approx(57.6)
    assert cost_per_day(GPU, 28_801, 20) == pytest.approx(115.2)


def test_only_a_gpu_and_a_price_break_even() -> None:
    assert list(told([GPU, PAID], {"ours": 20.0, "hosted": 5.0})) == ["ours/hosted"]
    with pytest.raises(ValueError, match="needs a price"):
        break_even(PAID, GPU, 20)
