"""What a run will ask for, said before it asks: how many images of whom, and what they cost.

Knows no HTTP.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from redux_server.bench.load import ARRIVALS
from redux_server.bench.target import Target
from redux_server.bench.task_client import Limits
from redux_server.bench.workload import Workload
from redux_server.settings import UsageError

DEFAULT_IMAGES = 20
DEFAULT_KNEE_IMAGES = 400
DEFAULT_MAX_COST = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run. ``rate`` is in images a minute; without it the loop is closed.

    ``images`` are those asked of each target, and the most a search for the knee may ask for.
    """

    targets: Sequence[Target]
    workload: Workload = field(repr=False)
    images: int = DEFAULT_IMAGES
    clients: int = 1
    rate: float | None = None
    arrivals: str = "poisson"
    burstiness: float = 2.0
    duration_s: float | None = None
    has_knee: bool = False
    slo_s: float = 10.0
    limits: Limits = field(default_factory=Limits)
    seed: int = 0

    @property
    def requests(self) -> int:
        """Requests to each target: the most there will be."""
        count = math.ceil(self.images / self.workload.num_images)
        if self.rate is not None and self.duration_s is not None and not self.has_knee:
            per_s = self.rate / self.workload.num_images / 60
            count = min(count, max(1, round(per_s * self.duration_s)))
        return count

    @property
    def images_of_each(self) -> int:
        """Images of each target: the most there will be."""
        return self.requests * self.workload.num_images

    @property
    def block(self) -> int:
        """Requests of one target until it is another's turn."""
        if len(self.targets) == 1:
            return self.requests
        if self.rate is None:
            return max(4 * self.clients, math.ceil(self.requests / 20))
        per_minute = self.rate / self.workload.num_images
        return max(20, math.ceil(per_minute))  # a minute, for a queue needs time to build up

    def cost_of(self, target: Target) -> float | None:
        """Dollars at the price given, None where none was; what is local costs nothing an image."""
        if target.price is not None:
            return target.price * self.images_of_each
        return 0.0 if target.is_local or target.gpu_hour is not None else None

    @property
    def cost(self) -> float:
        """Dollars, of the targets whose price is known."""
        return sum(self.cost_of(target) or 0.0 for target in self.targets)

    @property
    def needs_consent(self) -> bool:
        """Whether it costs something, or leaves this machine."""
        return self.cost > 0 or not all(target.is_local for target in self.targets)

    def lines(self) -> list[str]:
        """The plan in words."""
        said = [f"{self._what()} of each target, {self._how()}:"]
        upto = "at most " if self.has_knee or self.duration_s is not None else ""
        for target in self.targets:
            cost = self.cost_of(target)
            price = "price unknown (give price=)" if cost is None else f"${cost:.2f}"
            if target.price is not None:
                price += f" at ${target.price:g} an image"
            count = _images(self.images_of_each)
            said.append(f"  {target.name}  {upto}{count}, {price}  ({target.url})")
        said.append(f"  in all {upto}{_images(self.images_of_each * len(self.targets))}, "
                    f"${self.cost:.2f}")  # fmt: skip
        return said

    def load(self) -> dict[str, Any]:
        """For reports: two runs can be compared only if this is the same."""
        told: dict[str, Any] = {"kind": "closed", "clients": self.clients}
        if self.has_knee:
            told = {"kind": "knee", "slo_s": self.slo_s, "arrivals": self.arrivals}
        elif self.rate is not None:
            told = {"kind": "open", "rate_per_minute": self.rate, "arrivals": self.arrivals}
        if told.get("arrivals") == "gamma":
            told["burstiness"] = self.burstiness
        return told

    def _what(self) -> str:
        size, count = self.workload.parameters["size"], len(self.workload.pictures)
        return f"{_images(self.images_of_each)} ({size}, {count} pictures)"

    def _how(self) -> str:
        if self.has_knee:
            return f"in search of the rate whose p95 reaches {self.slo_s:g} s"
        if self.rate is not None:
            return f"at {self.rate:g} images a minute ({self.arrivals})"
        return f"by {self.clients} client{'s' * (self.clients != 1)}"


def check(plan: Plan, max_cost: float | None) -> None:
    """Raise ``UsageError`` for a plan that cannot be, or costs more than ``max_cost`` dollars.

    Without ``max_cost`` the limit is one dollar.
    """
    _check_numbers(plan)
    if max_cost is not None:
        unknown = [each.name for each in plan.targets if plan.cost_of(each) is None]
        if unknown:
            raise UsageError(
                f"--max-cost cannot be kept: {unknown[0]} has no price; give it price=DOLLARS"
            )
    limit = DEFAULT_MAX_COST if max_cost is None else max_cost
    if plan.cost > limit:
        raise UsageError(
            f"this would cost ${plan.cost:.2f}, more than ${limit:.2f}; nothing was sent. "
            "Ask for fewer --images, or allow more with --max-cost"
        )


def _check_numbers(plan: Plan) -> None:
    for flag, value, low, high in (
        ("--images", plan.images, 1, 1_000_000),
        ("--clients", plan.clients, 1, 1000),
        ("--rate", plan.rate, 1e-3, 1e6),
        ("--duration", plan.duration_s, 1e-3, 1e6),
        ("--slo", plan.slo_s, 1e-3, 1e5),
        ("--burstiness", plan.burstiness, 0.1, 20),
        ("--timeout", plan.limits.timeout_s, 1, 1e5),
        ("--poll", plan.limits.poll_s, 0, 60),
    ):
        if value is not None and not low <= value <= high:
            raise UsageError(f"{flag} must be {low:g} to {high:g}, got {value:g}")
    if plan.arrivals not in ARRIVALS:
        raise UsageError(f"--arrivals must be one of {', '.join(ARRIVALS)}, got {plan.arrivals!r}")


def _images(count: int) -> str:
    return f"{count:,} image{'s' * (count != 1)}"
