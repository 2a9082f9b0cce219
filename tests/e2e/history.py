"""What clients saw of their tasks, and what must never be among it.

A client logs every accepted task, every poll, every webhook and every download in a
``TaskHistory``; ``check`` reads the logs and knows nothing of the server's inside.
"""

import io
import itertools
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

RANKS = {"created": 0, "processing": 1, "completed": 2, "failed": 2, "cancelled": 2}
LAST = 2
FIXED = ("id", "model", "input", "created_at", "urls")


@dataclass(frozen=True)
class Poll:
    """One answer: its HTTP status and, with 200, the prediction. ``at`` is monotonic seconds."""

    at: float
    http_status: int
    prediction: dict[str, Any] | None

    @property
    def rank(self) -> int:
        return RANKS.get(str((self.prediction or {}).get("status")), -1)

    @property
    def is_open(self) -> bool:
        """Whether it said that the task had not ended."""
        return 0 <= self.rank < LAST


@dataclass(frozen=True)
class Download:
    """What was behind an output's URL."""

    url: str
    http_status: int
    data: bytes


@dataclass
class TaskHistory:
    """All that its client ever learned of one task.

    ``cancelled_at`` is when the client asked for that, ``deleted_at`` when its delete was answered,
    both in monotonic seconds. ``ends_as`` is the end that its request must have, if not cancelled.
    ``told`` holds the predictions that its webhook brought, if it ``has_webhook``.
    """

    id: str
    num_images: int
    idempotency_key: str = ""
    ends_as: str = ""
    has_webhook: bool = False
    cancelled_at: float | None = None
    deleted_at: float | None = None
    accepted_at: float = field(default_factory=time.monotonic)
    polls: list[Poll] = field(default_factory=list)
    downloads: list[Download] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)

    def note(self, http_status: int, prediction: dict[str, Any] | None) -> None:
        self.polls.append(Poll(time.monotonic(), http_status, prediction))

    def is_deleted(self, at: float) -> bool:
        return self.deleted_at is not None and at > self.deleted_at

    @property
    def ends(self) -> list[Poll]:
        return [poll for poll in self.polls if poll.rank == LAST]

    @property
    def took_s(self) -> float:
        """Seconds from acceptance to the first answer that said it had ended."""
        return self.ends[0].at - self.accepted_at if self.ends else float("inf")


@dataclass(frozen=True)
class Anomaly:
    """A promise that was broken."""

    kind: str
    task_id: str
    detail: str = ""


def check(histories: Iterable[TaskHistory], *, bound_s: float) -> list[Anomaly]:
    """Every broken promise in ``histories``; tasks must end within ``bound_s`` seconds."""
    found: list[Anomaly] = []
    seen: set[str] = set()
    made: dict[str, str] = {}
    for history in histories:
        if history.idempotency_key:
            first = made.setdefault(history.idempotency_key, history.id)
            if first != history.id:
                found.append(Anomaly("two tasks of one idempotency key", history.id, first))
            elif history.id in seen:  # its client asked twice, and was told of one task
                continue
        if history.id in seen:
            found.append(Anomaly("id given twice", history.id))
        seen.add(history.id)
        for kind, detail in _problems(history, bound_s):
            found.append(Anomaly(kind, history.id, detail))
    return found


def _problems(history: TaskHistory, bound_s: float) -> Iterable[tuple[str, str]]:
    yield from _bad_answers(history)
    yield from _steps_back(history)
    if history.deleted_at is not None and not history.ends:
        return
    if not history.ends:
        yield "never ended", f"{len(history.polls)} polls"
        return
    if history.took_s > bound_s:
        yield "late", f"{history.took_s:.1f} s"
    yield from _changes(history)
    yield from _bad_ends(history)
    yield from _bad_webhooks(history)


def _bad_answers(history: TaskHistory) -> Iterable[tuple[str, str]]:
    for poll in history.polls:
        if history.is_deleted(poll.at):
            if poll.http_status == 200:
                yield "came back after its deletion", _state(poll)
        elif poll.http_status == 404:
            yield "lost", "unknown to the server"
        elif poll.http_status >= 400:
            yield "error answer", str(poll.http_status)
        elif poll.rank < 0:
            yield "unknown state", str(poll.prediction)


def _steps_back(history: TaskHistory) -> Iterable[tuple[str, str]]:
    answered = [poll for poll in history.polls if poll.rank >= 0]
    for before, after in itertools.pairwise(answered):
        if after.rank < before.rank:
            yield "state went back", f"{_state(before)} to {_state(after)}"


def _changes(history: TaskHistory) -> Iterable[tuple[str, str]]:
    texts = {json.dumps(poll.prediction, sort_keys=True) for poll in history.ends}
    if len(texts) > 1:
        yield "end changed", " | ".join(sorted(texts))
    answered = [poll.prediction for poll in history.polls if poll.prediction]
    for name in FIXED:
        if len({json.dumps(prediction.get(name), sort_keys=True) for prediction in answered}) > 1:
            yield "fixed field changed", name


def _bad_ends(history: TaskHistory) -> Iterable[tuple[str, str]]:
    ended = history.ends[-1].prediction or {}
    outputs = ended["outputs"]
    if ended["status"] == "cancelled" and history.cancelled_at is None:
        yield "cancelled unasked", str(ended)
    elif history.ends_as and ended["status"] not in (history.ends_as, "cancelled"):
        yield "ended otherwise", f"{ended['status']} ({ended['error']})"
    if ended["status"] != "completed":
        if outputs:
            yield "failed task with outputs", str(outputs)
        if not ended["error"] or not ended["code"]:
            yield "failed task without a reason", str(ended)
        return
    if len(outputs) != history.num_images:
        yield "wrong number of outputs", f"{len(outputs)} of {history.num_images}"
    owners = {tuple(urlsplit(url).path.split("/")[-3:-1]) for url in outputs}
    if len(owners) > 1 or any(task_id != history.id for task_id, _ in owners):
        yield "outputs of several attempts", str(sorted(owners))
    fetched = {download.url: download for download in history.downloads}
    for url in outputs:
        problem = _download_problem(fetched.get(url))
        if problem:
            yield "output unusable", f"{url}: {problem}"


def _bad_webhooks(history: TaskHistory) -> Iterable[tuple[str, str]]:
    """At least one, unless the task was deleted before; all of them say what polls say."""
    ended = history.ends[-1].prediction or {}
    if history.told and not history.has_webhook:
        yield "told unasked", str(history.told[0])
    is_due = history.has_webhook and history.deleted_at is None and ended["status"] != "cancelled"
    if is_due and not history.told:
        yield "never told", str(ended["status"])
    for said in history.told:
        if said != ended:
            yield "told another end", f"{said} is not {ended}"


def _download_problem(download: Download | None) -> str:
    if download is None:
        return "never fetched"
    if download.http_status != 200:
        return f"HTTP {download.http_status}"
    try:
        with Image.open(io.BytesIO(download.data), formats=["PNG"]) as image:
            image.load()
    except (OSError, SyntaxError) as error:
        return f"no PNG: {error}"
    return ""


def _state(poll: Poll) -> str:
    return str((poll.prediction or {}).get("status"))
