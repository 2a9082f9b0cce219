"""One request through the task API of a target: submit, wait, download, and when each was.

A submit is sent again only where that cannot make a second image: after a 429, which took nothing,
or under an ``Idempotency-Key`` that the target knows. A submit whose fate is unknown is an error.

When a poll finds a task done, it may have been done at any time of the pause before that poll: half
of the pause is taken off, so that our polling is no part of the target's latency. It is reported on
its own.
"""

import asyncio
import base64
import binascii
import random
import re
import uuid
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from redux_server.bench.target import Target
from redux_server.bench.transport import Answer, NoAnswer, NotSent, Transport
from redux_server.bench.workload import Request, Workload

SUBMIT_S = 60.0
POLL_S = 30.0
DOWNLOAD_S = 60.0
REPEATS = 3
_PAUSE_S = 1.0
_DEFAULT_RETRY_S = 5.0
_SOONEST_POLL_S, _LATEST_POLL_S, _POLL_SHARE = 0.005, 1.0, 0.08
_POLLS_PER_S = 400.0  # of all open tasks together: a thousand of them take less than half a core
_AGAIN = frozenset({502, 503, 504})
_TASK_ID = re.compile(r"\w[\w.:-]{0,127}", re.ASCII)
_OPEN = ("created", "processing")

COMPLETED = "completed"
UNFINISHED = "unfinished"
NOT_SENT = "not_sent"


@dataclass(slots=True)
class Sample:
    """What became of one request. Times are seconds of the loop's clock; durations say ``_s``.

    ``outcome`` is ``completed``, ``unfinished`` (the run was stopped), ``not_sent`` (no room for
    another open task) or the kind of error; ``quality`` adds kinds that only the images show.
    """

    target: str
    index: int
    block: int = 0
    rate: float = 0.0
    is_measured: bool = True
    scheduled_at: float | None = None
    sent_at: float = 0.0
    ended_at: float = 0.0
    submit_s: float | None = None
    inference_s: float | None = None
    ready_s: float | None = None
    poll_lag_s: float = 0.0
    poll_s: float = 0.0
    polls: int = 0
    poll_errors: int = 0
    download_s: float | None = None
    bytes_sent: int = 0
    bytes_received: int = 0
    rate_limited: int = 0
    held_back_s: float = 0.0
    repeats: int = 0
    outcome: str = UNFINISHED
    detail: str = ""
    task_id: str = ""
    outputs: list[str] = field(default_factory=list)
    flagged: list[bool] = field(default_factory=list)

    @property
    def latency_s(self) -> float | None:
        """From the scheduled start (else the accepted submit's) to the last byte of the images."""
        if self.ready_s is None or self.download_s is None:
            return None
        late = 0.0 if self.scheduled_at is None else self.sent_at - self.scheduled_at
        return late + self.ready_s + self.download_s

    @property
    def waiting_s(self) -> float | None:
        """Between accepting and ready, without the inference that the target told of."""
        if self.ready_s is None or self.submit_s is None:
            return None
        return max(0.0, self.ready_s - self.submit_s - (self.inference_s or 0.0))


class Failure(Exception):
    """Why a request ends without images: ``kind`` is a word for tables."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(detail)
        self.kind, self.detail = kind, detail


class Limits(NamedTuple):
    """``timeout_s`` is that of a whole task; ``poll_s`` is a fixed interval, or 0 for our own."""

    timeout_s: float = 300.0
    poll_s: float = 0.0


Save = Callable[[str, int, int, bytes], str]
"""Target, index, image, bytes: stores an output and returns its place."""


class TaskClient:
    """Sends the requests of a workload to one target. Its clock is the running loop's."""

    def __init__(
        self,
        target: Target,
        key: str,
        transport: Transport,
        workload: Workload,
        save: Save,
        *,
        limits: Limits | None = None,
        has_idempotency: bool = False,
        seed: int = 0,
    ) -> None:
        self.target = target
        self.has_idempotency = has_idempotency
        self._key = key
        self._authorization = {"Authorization": f"Bearer {key}"} if key else {}
        self._transport = transport
        self._workload = workload
        self._save = save
        self._limits = limits or Limits()
        self._random = random.Random(seed)
        self._fastest_s = 0.0
        self._polled_now = 0

    async def run(self, request: Request, sample: Sample) -> None:
        """Carry out ``request`` and fill in ``sample``, also when cancelled."""
        loop = asyncio.get_running_loop()
        sample.sent_at = loop.time()
        try:
            task = await self._submit(request, sample)
            task = await self._ended(task, sample)
            await self._download(task, request, sample)
            sample.outcome = COMPLETED
        except Failure as failure:
            sample.outcome, sample.detail = failure.kind, self._scrubbed(failure.detail)
        except OSError as error:
            sample.outcome, sample.detail = "not_saved", error.strerror or str(error)
        finally:
            sample.ended_at = loop.time()

    # --- submit -----------------------------------------------------------------------------------

    async def _submit(self, request: Request, sample: Sample) -> dict[str, Any]:
        """The task, as the target first tells of it."""
        loop = asyncio.get_running_loop()
        first_sent_at, is_sync = sample.sent_at, self.target.mode == "sync"
        more = {"enable_sync_mode": True} if is_sync else {}
        body = self._workload.body(request, **more)
        headers = {"Content-Type": "application/json", **self._authorization}
        if self.has_idempotency:
            headers["Idempotency-Key"] = str(uuid.uuid4())
        url = f"{self.target.url}/api/v3/{self.target.model}"
        timeout_s = self._limits.timeout_s if is_sync else SUBMIT_S
        while True:
            sent_at = loop.time()
            sample.bytes_sent += len(body)
            answer = await self._sent(url, headers, body, timeout_s, sample)
            if answer is not None and answer.status == 200:
                break
            if answer is not None and answer.status == 429:
                pause_s = await self._hold_back(answer, sample, first_sent_at)
                sample.held_back_s += pause_s
                if sample.scheduled_at is None:
                    sample.sent_at = loop.time()  # a closed loop times the submit that was taken
                continue
            sample.repeats += 1
            await asyncio.sleep(_PAUSE_S)
        sample.submit_s = loop.time() - sent_at
        sample.bytes_received += len(answer.body)
        return self._task(answer)

    async def _sent(
        self,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        timeout_s: float,
        sample: Sample,
    ) -> Answer | None:
        """The answer to a submit; None where it may be sent again, since it has a key to repeat."""
        may_repeat = self.has_idempotency and sample.repeats < REPEATS
        try:
            answer = await self._transport.request("POST", url, headers, body, timeout_s)
        except NotSent as error:
            raise Failure("unreachable", str(error)) from None
        except NoAnswer as error:
            if may_repeat:
                return None
            raise Failure("uncertain_submit", f"it may have been taken: {error}") from None
        if answer.status in _AGAIN and may_repeat:
            return None
        if answer.status not in (200, 429):
            raise Failure(f"http_{answer.status}", _message(answer))
        return answer

    async def _hold_back(self, answer: Answer, sample: Sample, since: float) -> float:
        """Wait as a 429 says; raises ``Failure`` where that is longer than the task may take."""
        sample.rate_limited += 1
        pause_s = retry_after_s(answer)
        spent_s = asyncio.get_running_loop().time() - since
        if spent_s + pause_s > self._limits.timeout_s:
            raise Failure("http_429", f"told to wait {pause_s:g} s: {_message(answer)}")
        await asyncio.sleep(pause_s)
        return pause_s

    # --- wait -------------------------------------------------------------------------------------

    async def _ended(self, task: dict[str, Any], sample: Sample) -> dict[str, Any]:
        """The task once it has completed."""
        loop = asyncio.get_running_loop()
        sample.task_id = str(task["id"])
        if task["status"] in _OPEN and self.target.mode == "stream":
            task = await self._followed(task)
        if task["status"] in _OPEN:
            self._polled_now += 1
            try:
                task = await self._polled(task, sample)
            finally:
                self._polled_now -= 1
        else:
            sample.ready_s = loop.time() - sample.sent_at
        if task["status"] != COMPLETED:
            sample.ready_s = None
            raise Failure("failed", f"{task['status']}: {task.get('error') or 'no reason given'}")
        timings = task.get("timings")
        inference = timings.get("inference") if isinstance(timings, dict) else None
        if isinstance(inference, int | float) and inference > 0:
            sample.inference_s = inference / 1000
        return task

    async def _followed(self, task: dict[str, Any]) -> dict[str, Any]:
        """The task as its stream told of it last."""
        url = f"{self.target.url}/api/v3/predictions/{task['id']}/stream"
        events = self._transport.events(url, self._authorization, self._limits.timeout_s)
        async with aclosing(events) as found:
            async for data in found:
                if data.get("id") == task["id"] and isinstance(data.get("status"), str):
                    task = data
                if task["status"] not in _OPEN:
                    break
        return task

    async def _polled(self, task: dict[str, Any], sample: Sample) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        url = self._poll_url(task)
        pause_s = 0.0
        while task["status"] in _OPEN:
            answered_at = loop.time()
            spent_s = answered_at - sample.sent_at
            if spent_s > self._limits.timeout_s:
                raise Failure("timeout", f"still {task['status']} after {spent_s:.0f} s")
            await asyncio.sleep(self._pause_s(spent_s, is_first=sample.polls == 0))
            asked_at = loop.time()
            pause_s = asked_at - answered_at
            task = await self._poll(url, task, sample)
            sample.polls += 1
            sample.poll_s += loop.time() - asked_at
        found_s = loop.time() - sample.sent_at
        sample.poll_lag_s = pause_s / 2
        sample.ready_s = found_s - sample.poll_lag_s
        self._fastest_s = min(self._fastest_s or found_s, found_s)
        return task

    def _pause_s(self, spent_s: float, *, is_first: bool) -> float:
        """Until the next poll: a twelfth of the time spent, at no fixed phase.

        The first comes at half the time of the fastest task so far: before that, none was ready.
        Where many are open, all of them together poll no faster than ``_POLLS_PER_S``.
        """
        if self._limits.poll_s:
            return self._limits.poll_s * self._random.uniform(0.9, 1.1)
        pause_s = min(_LATEST_POLL_S, max(_SOONEST_POLL_S, spent_s * _POLL_SHARE))
        if is_first:
            pause_s = max(pause_s, self._fastest_s / 2 - spent_s)
        pause_s = max(pause_s, self._polled_now / _POLLS_PER_S)
        return pause_s * self._random.uniform(0.75, 1.25)

    async def _poll(self, url: str, task: dict[str, Any], sample: Sample) -> dict[str, Any]:
        """The task as it is now; as it was, where that could not be learnt this time."""
        try:
            answer = await self._transport.request("GET", url, self._authorization, b"", POLL_S)
        except (NotSent, NoAnswer):
            sample.poll_errors += 1
            await asyncio.sleep(_PAUSE_S)
            return task
        sample.bytes_received += len(answer.body)
        if answer.status == 200:
            return self._task(answer)
        if answer.status != 429 and answer.status < 500:
            raise Failure(f"poll_http_{answer.status}", _message(answer))
        sample.poll_errors += 1
        await asyncio.sleep(retry_after_s(answer) if answer.status == 429 else _PAUSE_S)
        return task

    def _poll_url(self, task: dict[str, Any]) -> str:
        """Where the target says; elsewhere than at the target itself our key is not sent."""
        urls = task.get("urls")
        told = str(urls.get("get") or "") if isinstance(urls, dict) else ""
        there = self._reachable(told)
        if not there.startswith(f"{self.target.url}/"):
            return f"{self.target.url}/api/v3/predictions/{task['id']}/result"
        return there

    def _reachable(self, url: str) -> str:
        """A URL of the target's host, the way we reach it: proxies change scheme and port."""
        try:
            theirs, ours = urlsplit(url), urlsplit(self.target.url)
            if theirs.hostname == ours.hostname:
                theirs = theirs._replace(scheme=ours.scheme, netloc=ours.netloc)
            return theirs.geturl()
        except ValueError:
            return ""

    # --- download ---------------------------------------------------------------------------------

    async def _download(self, task: dict[str, Any], request: Request, sample: Sample) -> None:
        outputs = task.get("outputs")
        if not isinstance(outputs, list) or len(outputs) != request.num_images:
            count = len(outputs) if isinstance(outputs, list) else 0
            raise Failure("missing_output", f"{count} outputs instead of {request.num_images}")
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        images = [await self._image(str(output), sample) for output in outputs]
        sample.download_s = loop.time() - began_at
        sample.bytes_received += sum(map(len, images))
        flags = task.get("has_nsfw_contents")
        if isinstance(flags, list):
            sample.flagged = [flag is True for flag in flags]
        for place, data in enumerate(images):
            sample.outputs.append(self._save(self.target.name, request.index, place, data))

    async def _image(self, output: str, sample: Sample) -> bytes:
        """The bytes at an output's URL, fetched without our key; or those of a base64 output."""
        if not re.match(r"https?://", output, re.IGNORECASE):
            try:
                return base64.b64decode(output.rpartition(",")[2], validate=True)
            except (binascii.Error, ValueError):
                raise Failure("download", "the output is neither a URL nor base64") from None
        url, problem = self._reachable(output), ""
        for tried in range(REPEATS):
            if tried:
                await asyncio.sleep(_PAUSE_S * tried)
            try:
                answer = await self._transport.request("GET", url, {}, b"", DOWNLOAD_S)
            except (NotSent, NoAnswer) as error:
                problem = str(error)
                continue
            if answer.status == 200:
                return answer.body
            problem = f"HTTP {answer.status}"
            if answer.status != 429 and answer.status < 500:
                break
        raise Failure("download", problem)

    # --- what they say ----------------------------------------------------------------------------

    def _task(self, answer: Answer) -> dict[str, Any]:
        told = answer.json()
        task = told.get("data") if isinstance(told, dict) else None
        if not isinstance(task, dict) or not isinstance(task.get("status"), str):
            raise Failure("not_the_task_api", "the answer holds no task")
        if not _TASK_ID.fullmatch(str(task.get("id", ""))):
            raise Failure("not_the_task_api", "the answer holds no task")
        return task

    def _scrubbed(self, text: str) -> str:
        """``text`` of a target for a report: short, and never with our key in it."""
        text = text.replace(self._key, "[key]") if self._key else text
        return " ".join(text.split())[:300]


def retry_after_s(answer: Answer) -> float:
    """The seconds of ``Retry-After``, or 5 where it says none."""
    text = answer.headers.get("retry-after", "").strip()
    return float(text) if re.fullmatch(r"\d{1,5}(\.\d{1,3})?", text) else _DEFAULT_RETRY_S


def _message(answer: Answer) -> str:
    told = answer.json()
    text = told.get("message") if isinstance(told, dict) else ""
    return str(text or f"HTTP {answer.status}")
