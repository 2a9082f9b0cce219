"""What a task is: its states, its input and its outcome. Knows no storage and no HTTP."""

import re
import secrets
import sys
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

TASK_ID = re.compile(r"[0-9a-f]{32}")


class Status(StrEnum):
    """The states a client sees; they only ever move down this list."""

    CREATED = "created"  # accepted and durable, waits for a worker
    PROCESSING = "processing"  # a worker has had it at least once
    COMPLETED = "completed"  # outputs are stored
    FAILED = "failed"  # ended without outputs; the outcome says why
    CANCELLED = "cancelled"  # ended because its owner asked for it

    @property
    def is_terminal(self) -> bool:
        """True when the task will never change again."""
        return self in (Status.COMPLETED, Status.FAILED, Status.CANCELLED)


class Code:
    """Task-level codes of WaveSpeed's error table (wire contract, `data.code`)."""

    OK = 0  # no error so far
    MEDIA_ACCESS_FAILED = 1402  # a picture cannot be fetched, read or decoded, or is gone
    TASK_FAILED = 1403  # the model refused the request, or the task was cancelled
    INTERNAL = 5000  # a fault of the server or of a worker; its log says more
    SYNC_TIMED_OUT = 5004  # only in an answer of sync mode: the task goes on and can be polled


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a task ended. ``outputs`` are blob keys; ``timings`` whole milliseconds by stage.

    ``quality`` is the tier that made the images; ``reused_steps`` of their steps were not computed.
    """

    status: Status
    outputs: list[str] = field(default_factory=list)
    has_nsfw_contents: list[bool] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    timings: dict[str, int] = field(default_factory=dict)
    quality: str = ""
    reused_steps: int = 0
    code: int = Code.OK
    error: str = ""

    @classmethod
    def cancellation(cls) -> "Outcome":
        """A task that its owner did not want any more."""
        text = "The task was cancelled at its owner's request."
        return cls(status=Status.CANCELLED, code=Code.TASK_FAILED, error=text)

    @classmethod
    def failure(cls, code: int, error: str) -> "Outcome":
        """A failed task, with the reason its owner will read."""
        return cls(status=Status.FAILED, code=code, error=error)


@dataclass(frozen=True, slots=True)
class NewTask:
    """A task about to be accepted. ``input`` holds the request's parameters, all filled in.

    Tasks of one ``shape`` may be denoised together; none has to be. ``idempotency_key``, if any,
    makes a second task with it an answer from the first, provided that ``digest`` is the same.
    ``webhook_url`` is whom to tell of its end, as ``redux_server.webhooks.callback`` writes it.
    Only workers of its ``fingerprint`` may take it; without one, any. ``picture_bytes`` is what its
    inline pictures count, ``output_bytes`` what its images may (see ``redux_server.tasks.stored``).
    """

    key_id: str
    model: str
    input: dict[str, Any]
    request_id: str = ""
    shape: str = ""
    webhook_url: str | None = None
    idempotency_key: str = ""
    digest: str = ""
    fingerprint: str = ""
    picture_bytes: int = 0
    output_bytes: int = 0
    id: str = field(default_factory=lambda: secrets.token_hex(16))


@dataclass(frozen=True, slots=True)
class Task:
    """A stored task. Times are Unix seconds.

    ``attempt`` counts how often it was started, ``crashes`` how often its worker was lost then.
    ``shape`` is empty once there was a crash: what may kill a worker is not put into company.
    """

    id: str
    key_id: str
    model: str
    status: Status
    input: dict[str, Any]
    request_id: str
    created_at: float
    started_at: float | None
    finished_at: float | None
    attempt: int
    crashes: int
    progress_step: int
    outcome: Outcome | None
    priority: int = 0
    shape: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Created:
    """Accepted: the task is stored and waits."""

    task: Task


@dataclass(frozen=True, slots=True)
class Replayed:
    """Its idempotency key came before, with the same request: the task of then."""

    task: Task


@dataclass(frozen=True, slots=True)
class KeyConflict:
    """Its idempotency key came before, with another request or for a task that is gone."""

    is_gone: bool


@dataclass(frozen=True, slots=True)
class NoRoom:
    """There is no room for another open task."""


@dataclass(frozen=True, slots=True)
class KeyFull:
    """Not accepted: its API key has as many open tasks as it may have."""


@dataclass(frozen=True, slots=True)
class ShareFull:
    """Not accepted: its API key holds its share of the queue, and what is left is for others."""


@dataclass(frozen=True, slots=True)
class StoreFull:
    """Not accepted: its API key may store ``left_bytes`` more, and it counts ``needed_bytes``."""

    needed_bytes: int
    left_bytes: int


@dataclass(frozen=True, slots=True)
class FreePlaces:
    """How many tasks more would be accepted of anyone, and of one API key.

    ``of_key`` is by the limit of a key, ``of_share`` by its share of the queue. ``of_bytes`` says
    how much they may store.
    """

    of_all: int
    of_key: int
    of_share: int = sys.maxsize
    of_bytes: int = sys.maxsize

    def refusal(self, needed_bytes: int = 1) -> NoRoom | KeyFull | ShareFull | StoreFull | None:
        """What the next task of the key would be told; None if it would be accepted.

        ``needed_bytes`` is what it will count at least.
        """
        if self.of_bytes < needed_bytes:
            return StoreFull(needed_bytes, max(0, self.of_bytes))
        if self.of_key <= 0:
            return KeyFull()
        if self.of_all <= 0:
            return NoRoom()
        return ShareFull() if self.of_share <= 0 else None


Acceptance = Created | Replayed | KeyConflict | NoRoom | KeyFull | ShareFull | StoreFull
