"""How fast the engine's step must be beside diffusers', and which of that a run has reached.

Ratios of times, ours over theirs; knows no networks and measures nothing.
"""

from collections.abc import Iterable, Mapping
from typing import Any

EAGER = {
    ("wide", 512, "empty"): 0.76,
    ("wide", 1024, "empty"): 0.89,
    ("wide", 512, "encoded"): 0.98,
    ("wide", 1024, "encoded"): 0.98,
    ("narrow", 512, "empty"): 0.67,
    ("narrow", 1024, "empty"): 0.82,
    ("narrow", 1536, "empty"): 0.90,
    ("narrow", 512, "encoded"): 0.90,
    ("narrow", 1024, "encoded"): 0.90,
    ("narrow", 1536, "encoded"): 0.90,
}
"""By network, size and prompt, neither side compiled."""

COMPILED = 1.0
"""For each of these cases with both sides compiled."""


def target(case: tuple[str, int, str], *, is_compiled: bool) -> float:
    """The ratio that ``case`` must not exceed."""
    return COMPILED if is_compiled else EAGER[case]


def judge(cases: Iterable[Mapping[str, Any]], device: str) -> list[dict[str, Any]]:
    """For each measured case whether its target holds.

    What counts is processor time on a CPU, which a busy machine disturbs less, and the time that
    passes on a GPU.
    """
    clock = "cpu" if device == "cpu" else "wall"
    return [
        {
            **{name: case[name] for name in ("network", "size", "prompt", "target")},
            "clock": clock,
            "ratio": case[f"ratio_{clock}"],
            "holds": case[f"ratio_{clock}"] <= case["target"],
        }
        for case in cases
    ]


def table(judged: Iterable[Mapping[str, Any]]) -> str:
    """What ``judge`` found, for people: a line for each case."""
    return "\n".join(
        f"{each['network']:<7} {each['size']:>5}²  {each['prompt']:<8} "
        f"{each['ratio']:.3f} of at most {each['target']:.2f} ({each['clock']})  "
        f"{'holds' if each['holds'] else 'DOES NOT HOLD'}"
        for each in judged
    )
