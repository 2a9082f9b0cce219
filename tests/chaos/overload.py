"""Ten times more than the server can do, for a minute: row 11 of the figures.

Three keys of different greed send without a pause between answer and next request, as many at once
as it takes. Watched from outside: the open tasks in the database, answers and how fast they come,
memory, and whose tasks are done.
"""

import asyncio
import statistics
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import func, select

from chaos.clients import IMAGE
from e2e.live import MODEL_PATH, LiveServer
from redux_server.database.connection import reader
from redux_server.database.migration import open_database
from redux_server.database.tables import tasks

MAX_QUEUE = 60
GREED = {"greedy": 6, "eager": 3, "modest": 2}  # parts of what is offered
_STEPS = 10  # 0.2 s on fake-slow: some five tasks a second
_BODY = {
    "image": IMAGE,
    "size": "512*512",
    "num_inference_steps": _STEPS,
    "enable_safety_checker": False,
}


def overload(folder: Path, *, seconds: float, factor: float = 10.0) -> dict[str, Any]:
    """The figures of one overload, of ``factor`` times what the server did just before."""
    share = MAX_QUEUE // len(GREED)
    flags = ["--max-queue", str(MAX_QUEUE), "--max-open-per-key", str(share)]
    server = LiveServer(folder / "data", *flags, "--log-level", "warning", model="fake-slow")
    with server:
        keys = {name: server.create_key(name) for name in GREED}
        capacity = _capacity(server, keys["greedy"])
        rate = capacity * factor
        watch = _Watch(server)
        watch.start()
        answers = asyncio.run(_flood(server, keys, rate, seconds))
        watch.may_end.set()
        watch.join()
    refused = sorted(answer["ms"] for answer in answers if answer["status"] == 429)
    done = watch.done_by_key()
    mean = statistics.mean(done.values())
    return {
        "seconds": seconds,
        "capacity_per_s": round(capacity, 2),
        "offered_per_s": round(len(answers) / seconds, 1),
        "times_capacity": round(len(answers) / seconds / capacity, 1),
        "answers": dict(Counter(str(answer["status"]) for answer in answers)),
        "refused_without_retry_after": sum(not answer["retry"] for answer in answers
                                           if answer["status"] == 429),
        "max_queue": MAX_QUEUE,
        "most_open": watch.most_open,
        "refusal_ms": {
            "median": round(statistics.median(refused), 1),
            "p99": round(refused[int(0.99 * (len(refused) - 1))], 1),
            "longest": round(refused[-1], 1),
        },
        "done_by_key": done,
        "furthest_from_the_mean": round(max(abs(n / mean - 1) for n in done.values()), 3),
        "rss_mib": watch.memory(),
    }  # fmt: skip


def _capacity(server: LiveServer, key: str) -> float:
    """Tasks a second when the worker is never idle."""
    with server.client(key) as client:
        ids = [client.post(MODEL_PATH, json=_BODY).json()["data"]["id"] for _ in range(15)]
        began, first, done = 0.0, 0, 0
        while done < 12:
            states = [
                client.get(f"/api/v3/predictions/{id_}/result").json()["data"]["status"]
                for id_ in ids[:13]
            ]
            finished = states.count("completed")
            if finished and not began:
                began, first = time.monotonic(), finished
            done = finished
            time.sleep(0.1)
        return (done - first) / (time.monotonic() - began)


async def _flood(
    server: LiveServer, keys: dict[str, str], rate: float, seconds: float
) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = []
    parts = sum(GREED.values())
    # Idle connections are let go before the server closes them, which is after 5 s.
    limits = httpx.Limits(max_connections=100, max_keepalive_connections=100, keepalive_expiry=2.0)
    async with httpx.AsyncClient(
        base_url=server.base_url, verify=False, trust_env=False, timeout=30, limits=limits
    ) as client:

        async def submit(key: str) -> None:
            began = time.perf_counter()
            headers = {"Authorization": f"Bearer {key}"}
            answer = await client.post(MODEL_PATH, json=_BODY, headers=headers)
            took_ms = (time.perf_counter() - began) * 1000
            retry = "retry-after" in answer.headers
            answers.append({"status": answer.status_code, "ms": took_ms, "retry": retry})

        async def offer(name: str) -> None:
            pause_s = parts / (GREED[name] * rate)
            began, sent = time.monotonic(), 0
            async with asyncio.TaskGroup() as group:
                while (now := time.monotonic()) < began + seconds:
                    if sent * pause_s > now - began:
                        await asyncio.sleep(sent * pause_s - (now - began))
                    group.create_task(submit(keys[name]))
                    sent += 1

        await asyncio.gather(*(offer(name) for name in keys))
    return answers


class _Watch(threading.Thread):
    """Counts open tasks ten times a second, and looks at memory once a second."""

    def __init__(self, server: LiveServer) -> None:
        super().__init__(name="watch", daemon=True)
        self.engine = open_database(server.database_url)
        self.pids = {"api": server.pid, "worker": server.worker_pids()[0]}
        self.may_end = threading.Event()
        self.most_open = 0
        self.rss: dict[str, list[float]] = {name: [] for name in self.pids}
        self.before = self._done()

    def run(self) -> None:
        looks = 0
        query = select(func.count()).select_from(tasks).where(tasks.c.finished_at.is_(None))
        while not self.may_end.wait(0.1):
            with reader(self.engine).connect() as db:
                self.most_open = max(self.most_open, int(db.scalar(query) or 0))
            if looks % 10 == 0:
                for name, pid in self.pids.items():
                    self.rss[name].append(_rss_mib(pid))
            looks += 1
        self.after = self._done()
        self.engine.dispose()

    def done_by_key(self) -> dict[str, int]:
        return {key: count - self.before.get(key, 0) for key, count in self.after.items()}

    def memory(self) -> dict[str, dict[str, float]]:
        """After the first ten seconds, and at the end."""
        return {
            name: {"after 10 s": found[min(10, len(found) - 1)], "at the end": found[-1]}
            for name, found in self.rss.items()
        }

    def _done(self) -> dict[str, int]:
        query = select(tasks.c.key_id, func.count()).where(tasks.c.status == "completed")
        with reader(self.engine).connect() as db:
            return {key: count for key, count in db.execute(query.group_by(tasks.c.key_id))}


def _rss_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * 4096 / 2**20, 1)
