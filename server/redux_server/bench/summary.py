"""From samples to the figures of ``report.json``. Knows no files and no pictures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

from redux_server.bench import cost
from redux_server.bench.load import MAX_OPEN
from redux_server.bench.measure import Measurement
from redux_server.bench.plan import Plan
from redux_server.bench.quality import Quality
from redux_server.bench.statistics import (
    PERCENTILES,
    Latencies,
    min_count,
    percentile,
    ratio,
)
from redux_server.bench.target import Target
from redux_server.bench.task_client import COMPLETED, NOT_SENT, UNFINISHED, Sample

STAGES = ("submit", "waiting", "inference", "download")
SCHEMA = 1
LATE_S = 0.05
"""A request that leaves so much later than scheduled left late: the bench itself was too slow."""

_NOTHING = {"value": None, "ci95": [None, None]}


def summarise(plan: Plan, measurement: Measurement, quality: Quality) -> dict[str, Any]:
    """All figures, findings and notes; what a run was started with is the caller's to add."""
    latencies = {target.name: measured(measurement.of(target.name)) for target in plan.targets}
    targets = {
        target.name: _target(plan, target, measurement, latencies[target.name])
        for target in plan.targets
    }
    rates = {name: told["capacity_per_minute"] for name, told in targets.items()}
    return {
        "schema": SCHEMA,
        "interrupted": measurement.is_interrupted,
        "workload": _workload(plan),
        "load": plan.load(),
        "planned_images_per_target": plan.images_of_each,
        "targets": targets,
        "ratios": _ratios(latencies),
        "quality": quality.told(),
        "break_even": cost.told(plan.targets, rates),
        "findings": [*quality.findings, *_findings(plan, measurement)],
        "notes": _notes(plan, measurement, latencies),
    }


def measured(samples: Sequence[Sample]) -> Latencies:
    """The latencies that count: completed, and neither warm-up nor cool-down."""
    good = [
        (sample.latency_s, sample.block)
        for sample in samples
        if sample.outcome == COMPLETED and sample.is_measured and sample.latency_s is not None
    ]
    return Latencies.of([seconds for seconds, _ in good], [block for _, block in good])


def _workload(plan: Plan) -> dict[str, Any]:
    workload = plan.workload
    return {
        "hash": workload.digest,
        "pictures": [picture.name for picture in workload.pictures],
        "parameters": workload.parameters,
        "seed": workload.seed,
    }


def _target(
    plan: Plan, target: Target, measurement: Measurement, latencies: Latencies
) -> dict[str, Any]:
    samples = measurement.of(target.name)
    kinds = errors_of(samples)
    search = measurement.searches.get(target.name)
    per_request = plan.workload.num_images
    knee = search.told(per_request) if search else None
    throughput = _throughput(plan, target, measurement)
    capacity = knee["images_per_minute"] if knee else throughput
    return {
        **target.describe(),
        "completed": sum(sample.outcome == COMPLETED for sample in samples),
        "errors": sum(kinds.values()),
        "errors_by_kind": kinds,
        "requests": len(samples),
        "not_sent": sum(sample.outcome == NOT_SENT for sample in samples),
        "unfinished": sum(sample.outcome == UNFINISHED for sample in samples),
        "measured": len(latencies),
        "images_per_minute": throughput,
        "capacity_per_minute": capacity,
        "price_per_image": cost.price_per_image(target, capacity),
        "latency_s": _percentiles(latencies),
        "stages_s": _stages(samples),
        "polling": _polling(samples),
        "rate_limited": {
            "answers": sum(sample.rate_limited for sample in samples),
            "held_back_s": round(sum(sample.held_back_s for sample in samples), 3),
        },
        "submits_repeated": sum(sample.repeats for sample in samples),
        "sent_late": sum(_is_late(sample) for sample in samples),
        "bytes": {
            "sent": sum(sample.bytes_sent for sample in samples),
            "received": sum(sample.bytes_received for sample in samples),
        },
        "knee": knee,
        "probes": [probe.told(per_request) for probe in search.probes] if search else [],
        "samples": {
            "latency_s": [round(float(each), 5) for each in latencies.seconds],
            "block": [int(each) for each in latencies.block],
        },
    }


def errors_of(samples: Sequence[Sample]) -> dict[str, int]:
    """How many requests ended in each kind of error."""
    none = (COMPLETED, UNFINISHED, NOT_SENT)
    return dict(
        Counter(sample.outcome for sample in samples if sample.outcome not in none).most_common()
    )


def _throughput(plan: Plan, target: Target, measurement: Measurement) -> float | None:
    """Images a minute of the time in which this target had its turn."""
    busy_s = measurement.busy_s.get(target.name, 0.0)
    samples = measurement.of(target.name)
    if plan.has_knee:  # the time is that of the probe at the knee
        search = measurement.searches.get(target.name)
        carried = search.carried if search else None
        samples = [each for each in samples if carried and each.rate == carried.rate]
    count = sum(sample.outcome == COMPLETED for sample in samples) * plan.workload.num_images
    return round(60 * count / busy_s, 4) if busy_s and count else None


def _percentiles(latencies: Latencies) -> dict[str, Any]:
    if not len(latencies):
        return {f"p{percent}": dict(_NOTHING) for percent in PERCENTILES}
    return {f"p{percent}": percentile(latencies, percent).told() for percent in PERCENTILES}


def _stages(samples: Sequence[Sample]) -> dict[str, Any]:
    """Median and p95 with their intervals of each part of the latency; None where unknown."""
    told: dict[str, Any] = {}
    good = [each for each in samples if each.outcome == COMPLETED and each.is_measured]
    for stage in STAGES:
        known = [
            (seconds, each.block)
            for each in good
            if (seconds := getattr(each, f"{stage}_s")) is not None
        ]
        found = Latencies.of([seconds for seconds, _ in known], [block for _, block in known])
        told[stage] = None
        if known:
            told[stage] = {f"p{each}": percentile(found, each).told() for each in (50, 95)}
    return told


def _polling(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """What our own polling cost; it is not part of the latency."""
    polled = [sample for sample in samples if sample.polls]
    if not polled:
        return None
    polls = sum(sample.polls for sample in polled)
    return {
        "polls_per_task": round(polls / len(polled), 2),
        "seconds_per_poll": round(sum(sample.poll_s for sample in polled) / polls, 5),
        "found_later_by_s": round(sum(each.poll_lag_s for each in polled) / len(polled), 5),
        "errors": sum(sample.poll_errors for sample in polled),
    }


def _ratios(latencies: Mapping[str, Latencies]) -> dict[str, Any]:
    """``B/A`` for all pairs, both ways round."""
    return {
        f"{above}/{below}": {
            f"p{percent}": ratio(latencies[above], latencies[below], percent).told()
            for percent in PERCENTILES
        }
        for above, below in permutations(latencies, 2)
        if len(latencies[above]) and len(latencies[below])
    }


def _is_late(sample: Sample) -> bool:
    return sample.scheduled_at is not None and sample.sent_at - sample.scheduled_at > LATE_S


# --- in words -------------------------------------------------------------------------------------


_WORDS = {
    "wrong_size": "came in a wrong size",
    "undecodable": "were no pictures that can be decoded",
    "failed": "failed",
    "timeout": "did not end in time",
    "uncertain_submit": "were submitted without an answer, so a task may or may not have run",
    "missing_output": "came with too few or too many images",
    "download": "could not be downloaded",
    "unreachable": "could not be sent, for no connection was made",
}


def _findings(plan: Plan, measurement: Measurement) -> list[str]:
    said = []
    for target in plan.targets:
        samples = measurement.of(target.name)
        for kind, count in errors_of(samples).items():
            first = next(sample for sample in samples if sample.outcome == kind)
            what = _WORDS.get(kind, f"ended with {kind.replace('_', ' ')}")
            detail = f" ({first.detail})" if first.detail else ""
            said.append(f"{target.name}: {count} of {len(samples)} requests {what}{detail}")
        search = measurement.searches.get(target.name)
        if plan.has_knee and (search is None or search.carried is None):
            said.append(f"{target.name}: no rate was found that it carries within {plan.slo_s:g} s")
    return said


def _notes(plan: Plan, measurement: Measurement, latencies: Mapping[str, Latencies]) -> list[str]:
    said = []
    if measurement.is_interrupted:
        said.append("The run was stopped before its end; the figures are of what was seen so far.")
    for target in plan.targets:
        name, samples = target.name, measurement.of(target.name)
        if count := sum(sample.outcome == NOT_SENT for sample in samples):
            said.append(f"{name}: {count} arrivals were not sent; {MAX_OPEN} tasks were open.")
        if count := sum(map(_is_late, samples)):
            said.append(
                f"{name}: {count} request{'s' * (count != 1)} left more than "
                f"{LATE_S * 1000:.0f} ms late; time counts from the schedule all the same."
            )
        if count := sum(sample.rate_limited for sample in samples):
            said.append(f"{name}: {count} submits were answered with 429; Retry-After was obeyed.")
        search = measurement.searches.get(name)
        if search and search.carried and not search.is_bracketed:
            said.append(f"{name}: the images were used up before the knee was known to 5 %.")
    return said + _too_few(latencies)


def _too_few(latencies: Mapping[str, Latencies]) -> list[str]:
    """Which percentiles rest on too few samples for their interval to be one."""
    said = []
    for name, found in latencies.items():
        poor = [p for p in PERCENTILES if 0 < len(found) < min_count(p)]
        if poor:
            which = " and ".join(f"p{each}" for each in poor)
            said.append(
                f"{name}: {which} rest on {len(found)} samples, too few for their upper end to be "
                f"certain ({' and '.join(str(min_count(each)) for each in poor)} are needed)."
            )
    return said
