"""What a task is: its states, its input and its outcome. Knows no storage and no HTTP."""

import re
import secrets
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

    OK = 0
    MEDIA_ACCESS_FAILED = 1402
    TASK_FAILED = 1403
    INTERNAL = 5000


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
    def failure(cls, code: int, error: str) -> "Outcome":
        """A failed task, with the reason its owner will read."""
        return cls(status=Status.FAILED, code=code, error=error)


@dataclass(frozen=True, slots=True)
class NewTask:
    """A task about to be accepted. ``input`` holds the request's parameters, all filled in."""

    key_id: str
    model: str
    input: dict[str, Any]
    request_id: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(16))


@dataclass(frozen=True, slots=True)
class Task:
    """A stored task. Times are Unix seconds.

    ``attempt`` counts how often it was started, ``crashes`` how often its worker was lost then.
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
