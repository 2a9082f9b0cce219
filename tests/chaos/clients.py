"""Clients that submit, poll, cancel, delete, repeat themselves and are told by webhook.

Each keeps a log of what it saw (``e2e.history``). What it got no answer to, it repeats as real
clients do: with an idempotency key the submit too, without one it can only begin anew.
"""

import itertools
import json
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from e2e.history import Download, TaskHistory
from e2e.live import MODEL_PATH, a_picture, data_uri, plain_client
from redux_pipelines.fake import SPOILED
from server.receiver import Received, receiving

IMAGE = data_uri(a_picture())
STEPS = (1, 2, 2, 3, 5)


@dataclass(frozen=True)
class Habits:
    """How a client behaves: each number is the share of its tasks."""

    most_open: int = 6
    poll_s: float = 0.5
    with_key: float = 0.4  # an idempotency key; half of those are sent twice, at once
    with_webhook: float = 0.3
    spoiled: float = 0.03
    cancelled: float = 0.04
    deleted: float = 0.03
    refused_webhooks: float = 0.2  # at the first try
    pictures: Sequence[str] = (IMAGE,)  # one of these is sent


class Client(threading.Thread):
    """Keeps ``most_open`` tasks open, at any of the ``urls``, until it is to ``finish``.

    An answer 503 with Retry-After is an honest one, and counted; any other error is logged where
    the checker finds it.
    """

    def __init__(
        self, urls: Sequence[str], key: str, seed: int, *, hook: str = "", habits: Habits
    ) -> None:
        super().__init__(name=f"client-{seed}", daemon=True)
        self.urls = itertools.cycle(urls)
        self.random = random.Random(seed)
        self.hook = hook
        self.habits = habits
        self.http = plain_client(headers={"Authorization": f"Bearer {key}"}, timeout=20)
        self.histories: list[TaskHistory] = []
        self.twins: list[TaskHistory] = []  # what a second submit with the same key was told
        self.open: list[TaskHistory] = []
        self.seen = Counter[str]()
        self.unexpected: list[str] = []
        self.failure: BaseException | None = None
        self.may_submit = threading.Event()
        self.may_submit.set()
        self.may_end = threading.Event()

    def run(self) -> None:
        try:
            while not self.may_end.is_set():
                if self.may_submit.is_set() and len(self.open) < self.habits.most_open:
                    self.submit()
                self.poll_one()
        except BaseException as error:
            self.failure = error

    # --- what a client does --------------------------------------------------------------------

    def submit(self) -> None:
        """One task more, repeated without an answer if that makes no second one."""
        dice, habits = self.random, self.habits
        is_spoiled = dice.random() < habits.spoiled
        num_images = dice.choice([1, 1, 1, 2])
        given = {
            "image": dice.choice(habits.pictures),
            "prompt": f"{dice.random()} {SPOILED if is_spoiled else ''}",
            "size": "512*512",
            "num_inference_steps": dice.choice(STEPS),
            "num_images": num_images,
            "enable_safety_checker": False,
        }
        key = uuid.uuid4().hex if dice.random() < habits.with_key else ""
        has_webhook = bool(self.hook) and dice.random() < habits.with_webhook
        query = {"webhook": self.hook} if has_webhook else {}
        headers = {"Idempotency-Key": key} if key else {}
        found = self._post(given, query, headers)
        if found is None:
            return

        def history(task_id: str) -> TaskHistory:
            ends_as = "failed" if is_spoiled else "completed"
            return TaskHistory(task_id, num_images, key, ends_as, has_webhook)

        log = history(found["id"])
        self.histories.append(log)
        self.open.append(log)
        if key and dice.random() < 0.5 and (again := self._post(given, query, headers)):
            self.twins.append(history(again["id"]))

    def _post(self, given: Any, query: Any, headers: Any) -> dict[str, Any] | None:
        for _ in range(8 if headers else 1):
            answer = self._call("POST", MODEL_PATH, json=given, params=query, headers=headers)
            if answer is not None and answer.status_code == 200:
                data: dict[str, Any] = answer.json()["data"]
                return data
            time.sleep(self.random.uniform(0.1, 0.5))
        self.seen["submits given up"] += 1
        return None

    def poll_one(self) -> None:
        """Poll the task that was polled the longest ago; sometimes cancel or delete it."""
        if not self.open:
            time.sleep(0.05)
            return
        log = self.open.pop(0)
        dice = self.random.random()
        if dice < self.habits.cancelled / 4:  # a task is polled some four times
            self.cancel(log)
        elif dice < (self.habits.cancelled + self.habits.deleted) / 4 and log.cancelled_at is None:
            self.delete(log)
        else:
            self.poll(log)
        if log.ends and log.deleted_at is None:
            self.download(log)
        if not log.ends and log.deleted_at is None:
            self.open.append(log)
        time.sleep(self.habits.poll_s / max(1, len(self.open)))

    def poll(self, log: TaskHistory) -> bool:
        """Whether there was an answer."""
        answer = self._call("GET", f"/api/v3/predictions/{log.id}/result")
        if answer is not None:
            log.note(answer.status_code, _prediction(answer))
        return answer is not None

    def cancel(self, log: TaskHistory) -> None:
        log.cancelled_at = log.cancelled_at or time.monotonic()
        answer = self._call("POST", f"/api/v3/predictions/{log.id}/cancel")
        if answer is not None:
            log.note(answer.status_code, _prediction(answer))

    def delete(self, log: TaskHistory) -> None:
        """Delete, and ask again until that is sure: without an answer it may have been done."""
        log.cancelled_at = time.monotonic()
        while log.deleted_at is None:
            answer = self._call("DELETE", f"/api/v3/predictions/{log.id}")
            if answer is not None and answer.status_code in (200, 404):
                log.deleted_at = time.monotonic()
            elif self.may_end.is_set():
                return
            time.sleep(0.05 if answer is not None else 0.3)

    def download(self, log: TaskHistory) -> bool:
        """Whether there was an answer to each."""
        urls = (log.ends[-1].prediction or {}).get("outputs", ())
        answers = [self._call("GET", httpx.URL(url).raw_path.decode()) for url in urls]
        for url, answer in zip(urls, answers, strict=True):
            if answer is not None:
                log.downloads.append(Download(url, answer.status_code, answer.content))
        return None not in answers

    def look_once_more(self) -> None:
        """After it all: the end must still be the same, and the outputs be there."""
        for log in self.histories:
            self._insist(lambda log=log: self.poll(log))
            fetched = {each.url for each in log.downloads if each.http_status == 200}
            ended = log.ends[-1].prediction if log.ends else None
            if ended and log.deleted_at is None and not fetched >= set(ended["outputs"]):
                self._insist(lambda log=log: self.download(log))

    def _insist(self, action: Callable[[], bool]) -> None:
        for _ in range(20):
            if action():
                return
            time.sleep(0.5)

    def _call(self, method: str, path: str, **more: Any) -> httpx.Response | None:
        """The answer of the next server; None where there was none, or an honest "not now"."""
        what = {"POST": "submit", "GET": "poll"}.get(method, "delete")
        try:
            answer = self.http.request(method, next(self.urls) + path, **more)
        except httpx.TransportError as error:
            self.seen[f"{what}: {type(error).__name__}"] += 1
            time.sleep(0.05)
            return None
        self.seen[f"{what}: {answer.status_code}"] += 1
        if answer.status_code == 503 and "retry-after" in answer.headers:
            time.sleep(0.2)
            return None
        if answer.status_code >= 500 or answer.status_code in (401, 409):
            self.unexpected.append(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
        return answer


def _prediction(answer: httpx.Response) -> dict[str, Any] | None:
    return answer.json()["data"] if answer.status_code == 200 else None


class Receiver:
    """Takes webhooks, and refuses a share of them the first time."""

    def __init__(self, seed: int, refused: float) -> None:
        self._share = refused
        self.calls: list[Received] = []
        self._random = random.Random(seed)
        self._refused: set[str] = set()
        self._lock = threading.Lock()

    def answer(self, call: Received) -> int:
        with self._lock:
            if call.id not in self._refused and self._random.random() < self._share:
                self._refused.add(call.id)
                return 500
            self.calls.append(call)
            return 204

    def told_ids(self) -> set[str]:
        with self._lock:
            return {call.id for call in self.calls}

    def hand_out(self, histories: Sequence[TaskHistory]) -> int:
        """Enter what came into the logs; returns how many calls were of no task in them."""
        by_id = {log.id: log for log in histories}
        strays = 0
        for call in self.calls:
            if call.id in by_id:
                by_id[call.id].told.append(json.loads(call.body))
            else:
                strays += 1
        return strays


@contextmanager
def webhook_receiver(seed: int, *, refused: float) -> Iterator[tuple[Receiver, str]]:
    """A receiver on loopback, and its URL."""
    receiver = Receiver(seed, refused)
    with receiving(receiver.answer) as port:
        yield receiver, f"http://127.0.0.1:{port}/hook"
