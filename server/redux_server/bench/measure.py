"""The run itself: targets asked first whether they can be measured, then block by block.

Knows no files but through what it is given to record with. The clock is the running loop's.
"""

import asyncio
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from redux_server.bench import knee
from redux_server.bench.load import arrival_times, blocks, closed_loop, open_loop
from redux_server.bench.plan import Plan
from redux_server.bench.target import Target
from redux_server.bench.task_client import COMPLETED, NOT_SENT, Sample, Save, TaskClient
from redux_server.bench.transport import Answer, NoAnswer, NotSent, Transport
from redux_server.bench.workload import Request
from redux_server.settings import UsageError

_ASK_S = 15.0
_FIRST_REQUESTS = 3


class Unusable(UsageError):
    """A target that cannot be measured; nothing was asked of any."""


@dataclass(slots=True)
class Measurement:
    """All that was seen, whole or up to where the run was stopped."""

    samples: list[Sample] = field(default_factory=list)
    searches: dict[str, knee.KneeSearch] = field(default_factory=dict)
    busy_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    is_interrupted: bool = False
    began_at: float = 0.0

    def of(self, target: str) -> list[Sample]:
        """The samples of one target, in the order of their ends."""
        return [sample for sample in self.samples if sample.target == target]


Shown = Callable[[int, int, str], None]
"""Requests ended, requests planned, what is going on."""


class Runner:
    """Carries out a plan over transports. ``record`` is given each sample as it ends."""

    def __init__(
        self,
        plan: Plan,
        keys: Mapping[str, str],
        transports: Mapping[str, Transport],
        *,
        save: Save,
        record: Callable[[Sample], None] = lambda _: None,
        show: Shown = lambda *_: None,
    ) -> None:
        self.measurement = Measurement()
        self._plan = plan
        self._transports = transports
        self._record = record
        self._show = show
        self._clients = {
            target.name: TaskClient(
                target,
                keys[target.name],
                transports[target.name],
                plan.workload,
                save,
                limits=plan.limits,
                has_idempotency=target.idempotency == "yes",
                seed=plan.seed + place,
            )
            for place, target in enumerate(plan.targets)
        }
        self._keys = keys
        self._random = random.Random(plan.seed)
        self._done = 0

    async def ask(self) -> None:
        """See of each target that it answers and knows our key, and whether submits have keys.

        Costs no image. Raises ``Unusable``.
        """
        for target in self._plan.targets:
            key = self._keys[target.name]
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            answer = await self._asked(target, "/api/v3/balance", headers)
            if answer is not None and answer.status in (401, 403):
                given = f"the key in {target.key_env}" if key else "a request without a key"
                raise Unusable(
                    f"{target.name} ({target.url}) refuses {given} (HTTP {answer.status}); "
                    "nothing was asked of any target"
                )
            if target.idempotency == "auto":
                answer = await self._asked(target, "/openapi.json", {})
                document = None if answer is None else answer.json()
                self._clients[target.name].has_idempotency = _has_idempotency(document)

    @property
    def idempotency(self) -> dict[str, bool]:
        """Which targets can be sent a submit again."""
        return {name: client.has_idempotency for name, client in self._clients.items()}

    async def measure(self) -> None:
        """Ask for the images; what was seen is in ``measurement``, also when cancelled."""
        measurement = self.measurement
        measurement.began_at = asyncio.get_running_loop().time()
        try:
            await (self._find_knees() if self._plan.has_knee else self._interleaved())
        except asyncio.CancelledError:
            measurement.is_interrupted = True
            raise
        finally:
            if not self._plan.has_knee:
                self._cut()

    async def _asked(self, target: Target, path: str, headers: Mapping[str, str]) -> Answer | None:
        """An answer that costs nothing; None where the target has none, which is no fault of it."""
        transport = self._transports[target.name]
        try:
            return await transport.request("GET", target.url + path, headers, b"", _ASK_S)
        except NoAnswer:
            return None
        except NotSent as error:
            raise Unusable(
                f"cannot reach {target.name} at {target.url} ({error}); nothing was asked of any "
                "target"
            ) from None

    # --- blocks -----------------------------------------------------------------------------------

    async def _interleaved(self) -> None:
        """Block by block, the targets in another order in each, so that the hour falls on all."""
        plan, loop = self._plan, asyncio.get_running_loop()
        ends_at = math.inf
        if plan.duration_s is not None and plan.rate is None:
            ends_at = loop.time() + plan.duration_s * len(plan.targets)
        for number, (first, count) in enumerate(blocks(plan.requests, plan.block)):
            order = list(plan.targets)
            self._random.shuffle(order)
            for target in order:
                began_at = loop.time()
                try:
                    await self._block(target, number, first, count, ends_at)
                finally:
                    self.measurement.busy_s[target.name] += loop.time() - began_at

    async def _block(
        self, target: Target, number: int, first: int, count: int, ends_at: float
    ) -> None:
        plan = self._plan
        run = self._clients[target.name].run
        requests = list(plan.workload.requests(first, count))
        new = partial(_new_sample, target=target.name, block=number)
        if plan.rate is None:
            clients = min(plan.clients, count)
            await closed_loop(run, requests, new, self._ended, clients=clients, ends_at=ends_at)
            return
        rate = plan.rate / plan.workload.num_images
        # the same arrivals for every target
        times = arrival_times(
            rate, count, plan.arrivals, plan.burstiness, seed=plan.seed * 1000 + number
        )
        await open_loop(run, requests, times, new, self._ended)

    def _ended(self, sample: Sample) -> None:
        self.measurement.samples.append(sample)
        self._done += 1
        planned = self._plan.requests * len(self._plan.targets)
        self._show(self._done, planned, sample.target)
        self._record(sample)

    def _cut(self) -> None:
        """Leave out of the figures what was sent while the load was building up or ebbing away."""
        for target in self._plan.targets:
            groups: dict[int, list[Sample]] = defaultdict(list)
            for sample in self.measurement.of(target.name):
                # a closed loop has one beginning; each block of an open loop starts from nothing
                groups[0 if self._plan.rate is None else sample.block].append(sample)
            for samples in groups.values():
                samples.sort(key=lambda sample: sample.index)
                few = len(samples) // 5
                if self._plan.rate is None:
                    head, tail = self._plan.clients, self._plan.clients - 1
                else:
                    head = tail = math.ceil(len(samples) / 10)
                head, tail = min(head, few), min(tail, few)
                for sample in [*samples[:head], *samples[len(samples) - tail :]]:
                    sample.is_measured = False

    # --- the knee ---------------------------------------------------------------------------------

    async def _find_knees(self) -> None:
        """One probe of each target by turns, until each target's knee is known."""
        plan = self._plan
        try:
            for target in plan.targets:
                await self._begin_search(target)
            await self._search()
        finally:
            for target in plan.targets:
                self._mark_knee(target)

    async def _begin_search(self, target: Target) -> None:
        """None is begun where not one of the first requests completes."""
        plan, left = self._plan, self._plan.requests
        rate = plan.rate / plan.workload.num_images if plan.rate else None
        if rate is None:
            rate = await self._first_rate(target)
            left -= _FIRST_REQUESTS
        if rate is not None:
            self.measurement.searches[target.name] = knee.KneeSearch(rate, left)

    async def _search(self) -> None:
        searching = [each for each in self._plan.targets if each.name in self.measurement.searches]
        number = 1
        while searching:
            for target in list(searching):
                search = self.measurement.searches[target.name]
                rate = search.next_rate()
                if rate is None or not await self._probe(target, search, rate, number):
                    searching.remove(target)
            number += 1

    async def _first_rate(self, target: Target) -> float | None:
        """What one client gets, in requests a minute: where the search begins."""
        requests = self._plan.workload.requests(0, min(_FIRST_REQUESTS, self._plan.requests))
        new = partial(_new_sample, target=target.name, block=0)
        await closed_loop(self._clients[target.name].run, requests, new, self._ended, clients=1)
        seen = [each.latency_s for each in self.measurement.of(target.name)]
        good = sorted(each for each in seen if each)
        return 60 / good[len(good) // 2] if good else None

    async def _probe(
        self, target: Target, search: knee.KneeSearch, rate: float, number: int
    ) -> bool:
        """Try one rate; False if there are not enough images left for it."""
        plan = self._plan
        duration_s = plan.duration_s or max(60.0, 4 * plan.slo_s)
        count = knee.probe_size(rate, duration_s)
        if count > search.budget:
            return False
        samples: list[Sample] = []
        late: list[float] = []

        def ended(sample: Sample) -> None:
            samples.append(sample)
            late.append(_penalised(sample))
            self._ended(sample)

        # indices go on where this target's last probe ended, so that no request is repeated
        first = max((each.index for each in self.measurement.of(target.name)), default=-1) + 1
        requests = list(plan.workload.requests(first, count))
        new = partial(_new_sample, target=target.name, block=number, rate=rate)
        times = arrival_times(
            rate, count, plan.arrivals, plan.burstiness, seed=plan.seed * 1000 + number
        )
        began_at = asyncio.get_running_loop().time()
        await open_loop(
            self._clients[target.name].run,
            requests,
            times,
            new,
            ended,
            goes_on=lambda: not knee.is_hopeless(late, count, plan.slo_s),
        )
        search.budget -= len(samples)
        seen = _latencies(samples, began_at, cut=count // 10)
        search.probes.append(knee.Probe(rate, seen, plan.slo_s, is_whole=len(samples) == count))
        return True

    def _mark_knee(self, target: Target) -> None:
        """The figures of a target are those of its knee."""
        search = self.measurement.searches.get(target.name)
        if search is None or not search.probes:
            return
        rate = search.carried.rate if search.carried else search.probes[-1].rate
        samples = self.measurement.of(target.name)
        for sample in samples:
            sample.is_measured = sample.rate == rate
        at_knee = [sample for sample in samples if sample.is_measured]
        for sample in sorted(at_knee, key=lambda each: each.index)[: len(at_knee) // 10]:
            sample.is_measured = False
        starts = [each.scheduled_at for each in at_knee if each.scheduled_at is not None]
        if len(starts) > 1:
            self.measurement.busy_s[target.name] = max(each.ended_at for each in at_knee) - min(
                starts
            )


def _new_sample(request: Request, *, target: str, block: int, rate: float = 0.0) -> Sample:
    return Sample(target=target, index=request.index, block=block, rate=rate)


def _penalised(sample: Sample) -> float:
    """Its latency; without images it took for ever."""
    latency_s = sample.latency_s
    return math.inf if sample.outcome != COMPLETED or latency_s is None else latency_s


def _latencies(samples: list[Sample], began_at: float, cut: int) -> list[tuple[float, float]]:
    """``(scheduled second, latency)`` without the first ``cut``, while the queue was empty."""
    ordered = sorted(samples, key=lambda sample: sample.index)[cut:]
    return [((each.scheduled_at or began_at) - began_at, _penalised(each)) for each in ordered]


def was_asked(sample: Sample) -> bool:
    """Whether a request left for the target at all."""
    return sample.outcome not in (NOT_SENT, "unreachable")


def _has_idempotency(document: Any) -> bool:
    """Whether an OpenAPI document says that submits take an ``Idempotency-Key``."""
    return any(
        isinstance(each, dict)
        and each.get("in") == "header"
        and str(each.get("name", "")).lower() == "idempotency-key"
        for each in _submit_parameters(document)
    )


def _submit_parameters(document: Any) -> Iterator[Any]:
    """The parameters of all POSTs: models have more names than a document lists."""
    paths = document.get("paths") if isinstance(document, dict) else None
    for operations in paths.values() if isinstance(paths, dict) else ():
        with suppress(KeyError, TypeError):
            yield from operations["post"]["parameters"]
