"""What an image costs: a price an image, or a price of a GPU hour over what a GPU does in one.

Dollars throughout. Knows no measurement but images a minute.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

from redux_server.bench.target import Target

_HOURS = 24
_MINUTES = 24 * 60


def price_per_image(target: Target, images_per_minute: float | None) -> float | None:
    """The price given, or that of a GPU which is busy all the time; None where neither is known."""
    if target.price is not None:
        return target.price
    if target.gpu_hour is None or not images_per_minute:
        return None
    return target.gpu_hour / (60 * images_per_minute)


def cost_per_day(
    target: Target, images_per_day: float, images_per_minute: float | None
) -> float | None:
    """Dollars a day: by the image, or for as many GPUs as it takes, rented around the clock."""
    if target.price is not None:
        return target.price * images_per_day
    if target.gpu_hour is None or not images_per_minute:
        return None
    gpus = max(1, math.ceil(images_per_day / (_MINUTES * images_per_minute)))
    return target.gpu_hour * _HOURS * gpus


def break_even(rented: Target, paid: Target, images_per_minute: float | None) -> dict[str, Any]:
    """From how many images a day on a rented GPU costs less than paying by the image.

    ``images_per_day`` is None where it never does: the GPUs that so many images take cost as much
    as the images, or more. Raises ``ValueError`` where the prices are not of these two kinds.
    """
    if rented.gpu_hour is None or rented.price is not None or not paid.price:
        raise ValueError("needs a price of a GPU hour and a price of an image")
    each_day = rented.gpu_hour * _HOURS
    count = math.ceil(round(each_day / paid.price, 6))
    capacity = _MINUTES * images_per_minute if images_per_minute else 0.0
    return {
        "images_per_day": count if count <= capacity else None,
        "capacity_per_day_of_one_gpu": round(capacity, 1),
        "gpu_per_day": round(each_day, 4),
    }


def told(targets: Sequence[Target], per_minute: Mapping[str, float | None]) -> dict[str, Any]:
    """Break-even of each GPU against each price, as reports have it."""
    found = {}
    for rented, paid in permutations(targets, 2):
        try:
            even = break_even(rented, paid, per_minute[rented.name])
        except ValueError:
            continue
        found[f"{rented.name}/{paid.name}"] = even
    return found
