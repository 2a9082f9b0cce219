"""Runs of the bench against imitations, in virtual time and without files."""

import asyncio
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from redux_server.bench.measure import Measurement, Runner
from redux_server.bench.plan import Plan
from redux_server.bench.target import Target
from redux_server.bench.workload import Picture, Workload
from server.bench import virtual
from server.bench.hosted import KEY, URL, Hosted


def dot(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def workload(**parameters: Any) -> Workload:
    pictures = [Picture(f"{name}.png", dot(name)) for name in ("red", "green", "blue")]
    return Workload(pictures, {"size": "512*512", **parameters})


def target(name: str, **options: Any) -> Target:
    return Target(name, f"{URL}.{name}", key_env="KEY", **options)


def measured(
    hosted: Mapping[str, Hosted], *, options: Mapping[str, Any] | None = None, **plan: Any
) -> tuple[Plan, Measurement]:
    """A whole run against the imitations by name; ``options`` are those of all targets."""
    targets = [target(name, **(options or {})) for name in hosted]
    made = Plan(targets=targets, workload=workload(), **plan)
    return made, virtual.run(run(made, hosted)).measurement


async def run(plan: Plan, hosted: Mapping[str, Hosted], stop_after_s: float = 1e9) -> Runner:
    runner = Runner(
        plan,
        {each.name: KEY for each in plan.targets},
        hosted,
        save=lambda name, index, place, data: f"{name}/{index}-{place}.png",
    )
    await runner.ask()
    try:
        async with asyncio.timeout(stop_after_s):
            await runner.measure()
    except TimeoutError:
        pass
    return runner
