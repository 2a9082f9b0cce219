"""The scenarios ``sql`` and ``celery``: two API nodes and three workers over services of our own.

The second node and the third worker reach database, broker and S3 through proxies that can be cut;
the first node and the first worker live by a date that can be set. Whoever dies is started again,
as a supervisor would.
"""

import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sqlalchemy import Row, create_engine, text

from chaos import harm
from chaos.clock import Clock
from chaos.faults import Fault
from chaos.services import BUCKET, S3, Postgres, RabbitMQ
from e2e.cluster import Node, RemoteWorker
from e2e.live import terminate
from e2e.proxy import Proxy
from e2e.restarted import rows_of
from redux_server.database.connection import connect
from redux_server.database.migration import upgrade_database
from redux_server.dispatch.device import worker_id
from redux_server.storage.signing import signing_secret

LEASE_S = 6.0
NODES, WORKERS = 2, 3
DISK_MIB, TMP_MIB = 256, 16
_PARTITION_S = 8.0


class Distributed:
    """The cluster, from ``start`` to ``stop``. ``engine`` is ``sql`` or ``celery``."""

    def __init__(self, folder: Path, engine: str, *, env: Mapping[str, str], seed: int = 0) -> None:
        self.name = engine
        self.folder = folder
        self.env = env
        self.random = random.Random(seed)
        self.database = Postgres(folder)
        self.broker = RabbitMQ(folder) if engine == "celery" else None
        self.pictures = S3(folder) if engine == "celery" else None
        self.clock = Clock(folder / "clock")
        self.hang_flag = folder / "hang"
        self.disks: list[Path] = []  # of the last node and the last worker, if we may mount any
        self.tmp: Path | None = None
        self.proxies: dict[str, Proxy] = {}
        self.nodes: list[Node] = []
        self.workers: list[RemoteWorker] = []
        self._open = ExitStack()
        self._mounts = ExitStack()
        self._rows: Callable[[], dict[str, Row[Any]]] = dict

    @property
    def services(self) -> list[Any]:
        return [each for each in (self.database, self.broker, self.pictures) if each]

    @property
    def urls(self) -> list[str]:
        return [node.base_url for node in self.nodes]

    @property
    def key(self) -> str:
        return self.nodes[0].key

    @property
    def log(self) -> str:
        logs = [each.log[-3000:] for each in (*self.nodes, *self.workers, *self.services)]
        return "\n--\n".join(logs)

    def start(self) -> None:
        for service in self.services:
            service.start(wait=False)
        for service in self.services:
            service.wait_up()
            self.proxies[service.name] = Proxy(("127.0.0.1", service.port))
            self._open.enter_context(self.proxies[service.name])
        engine = connect(self.database.url())
        upgrade_database(engine)
        engine.dispose()
        self._mount()
        self._build()
        for node in self.nodes:
            node.wait_ready()
        self._rows = self._open.enter_context(rows_of(self.database.url()))

    def _mount(self) -> None:
        """Small file systems that can be filled up, where that is allowed."""
        for name in (f"api{NODES - 1}", f"worker{WORKERS - 1}"):
            mounted = self._mounts.enter_context(harm.small_disk(self.folder / name, DISK_MIB))
            self.disks += [mounted] if mounted else []
        self.tmp = self._mounts.enter_context(harm.small_disk(self.folder / "tmp", TMP_MIB))

    def _build(self) -> None:
        for number in range(NODES):
            url = self.nodes[0].base_url if self.nodes else ""
            flags, env = self._given(behind_proxies=number == NODES - 1, with_clock=number == 0)
            port = ["--public-url", url] if url else []
            node = Node(
                self.folder, f"api{number}", *flags, *port, database_url=env[_DATABASE], env=env
            )
            if not url:
                node.flags += ("--public-url", node.base_url)
            node._url = self.database.url()
            node.ready_s = 600.0
            self.nodes.append(node)
            node.start(wait=False)
        for number in range(WORKERS):
            flags, env = self._given(behind_proxies=number == WORKERS - 1, with_clock=number == 0)
            first = self.nodes[0]
            self.workers.append(
                RemoteWorker(
                    self.folder, f"worker{number}", first, model="fake-slow", flags=flags, env=env
                )
            )

    def _given(self, *, behind_proxies: bool, with_clock: bool) -> tuple[list[str], dict[str, str]]:
        ports = {name: proxy.port for name, proxy in self.proxies.items() if behind_proxies}
        env = {_DATABASE: self.database.url(ports.get("postgresql", 0))}
        flags = ["--dispatch", self.name, "--lease-s", str(LEASE_S), "--max-attempts", "50"]
        flags += ["--webhook-allow", "127.0.0.1:*", "--webhook-timeout-s", "5"]
        flags += ["--min-free-disk", "24", "--step-timeout-s", str(harm.STEP_TIMEOUT_S)]
        env["CHAOS_HANG_FILE"] = str(self.hang_flag)
        if self.tmp:
            env["TMPDIR"] = str(self.tmp)
        if self.broker:
            env["FLUX_REDUX_BROKER_URL"] = self.broker.url(ports.get("rabbitmq", 0))
        if self.pictures:
            env.update(self.pictures.variables(ports.get("s3", 0)))
            flags += ["--blob-url", f"s3://{BUCKET}/chaos"]
        else:
            flags += ["--blob-url", f"file://{self.folder / 'pictures'}"]
        if with_clock:
            env.update(self.clock.variables())
        return flags, {**env, **self.env}

    def stop(self) -> None:
        for process in (*self.nodes, *self.workers):
            process.stop(timeout_s=20)
        self._open.close()
        for service in reversed(self.services):
            service.stop()
        self._mounts.close()

    def rows(self) -> dict[str, Row[Any]]:
        return self._rows()

    def pids(self) -> list[int]:
        """The processes whose memory is watched."""
        return [each.process.pid for each in (*self.nodes, *self.workers)]

    def save_logs(self, folder: Path) -> None:
        for each in (*self.nodes, *self.workers):
            shutil.copy(each.log_path, folder)

    # --- faults --------------------------------------------------------------------------------

    def faults(self) -> list[Fault]:
        some = [
            Fault("kill -9 API", self.kill_api, kills=True, weight=4),
            Fault("kill -9 worker", self.kill_worker, kills=True, weight=6),
            Fault("kill -9 database", self.kill_database, kills=True, weight=1.5),
            Fault("database connections ended", self.end_connections, weight=1),
            Fault("SIGTERM API, and start", self.restart_api, weight=0.5),
            Fault("SIGTERM worker, and start", self.restart_worker, weight=0.5),
            Fault("SIGSTOP worker for 2 leases", self.freeze_worker, lasts=True, weight=1.5),
        ]
        some += [
            Fault(f"{service.name} cut off from a node and a worker",
                  lambda name=service.name: self.partition(name, Proxy.cut), lasts=True)
            for service in self.services
        ]  # fmt: skip
        some += [
            Fault(f"{service.name} silent to a node and a worker",
                  lambda name=service.name: self.partition(name, Proxy.hold), lasts=True)
            for service in self.services
        ]  # fmt: skip
        if self.broker:
            some += [
                Fault("kill -9 broker", self.kill_broker, kills=True, weight=1),
                Fault("queue purged", self.purge, weight=1),
                Fault("queue deleted", lambda: self.purge(delete=True), weight=1),
            ]
        some += [
            Fault("kill -9 decoder", self.kill_decoder, kills=True, weight=4),
            Fault("device hangs", lambda: harm.hang_the_device(self.hang_flag), weight=1.5),
            Fault("temporary files wiped", self.wipe_temporary, weight=1.5),
        ]
        for disk in self.disks:
            what = f"disk of {disk.name} full for 6 s"
            some.append(Fault(what, lambda disk=disk: harm.fill(disk), lasts=True))
        if tmp := self.tmp:
            some += [
                Fault("/tmp full for 6 s", lambda: harm.fill(tmp), lasts=True),
                Fault("/tmp read-only for 6 s", lambda: harm.make_read_only(tmp), lasts=True),
            ]
        some += [
            Fault("clock +1 h, then back", lambda: self.shift_clock(3600), lasts=True),
            Fault("clock -1 h, then back", lambda: self.shift_clock(-3600), lasts=True),
        ]
        return some

    def kill_api(self) -> None:
        node = self.random.choice(self.nodes)
        node.kill()
        node.start(wait=False)

    def kill_worker(self) -> None:
        worker = self.random.choice(self.workers)
        worker.kill()
        worker.start()

    def restart_api(self) -> None:
        node = self.random.choice(self.nodes)
        terminate(node.process, 90.0)
        node.start(wait=False)

    def restart_worker(self) -> None:
        worker = self.random.choice(self.workers)
        worker.stop(timeout_s=90.0)
        worker.start()

    def kill_database(self) -> None:
        self.database.kill()
        self.database.start()

    def kill_broker(self) -> None:
        assert self.broker is not None
        self.broker.kill()
        self.broker.start()

    def end_connections(self) -> None:
        self._administer(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'flux-redux'"
        )

    def freeze_worker(self) -> None:
        """One at work, if there is one: it comes back as a zombie."""
        owners = {str(row.owner) for row in self.rows().values() if row.lease_until}
        at_work = [each for each in self.workers if worker_id(each.data_dir, "cpu") in owners]
        process = self.random.choice(at_work or self.workers).process
        process.send_signal(signal.SIGSTOP)
        time.sleep(2 * LEASE_S)
        process.send_signal(signal.SIGCONT)

    def partition(self, name: str, how: Callable[[Proxy], None]) -> None:
        proxy = self.proxies[name]
        how(proxy)
        time.sleep(_PARTITION_S)
        proxy.mend()

    def purge(self, *, delete: bool = False) -> None:
        from redux_server.dispatch.celery import queue_name, ticket_app

        assert self.broker is not None
        engine = connect(self.database.url())
        app = ticket_app(self.broker.url(), queue_name(signing_secret(engine)))
        engine.dispose()
        [queue] = app.conf.task_queues
        with app.connection_for_write() as connection, connection.channel() as channel:
            bound = queue(channel)
            bound.queue_declare()
            _ = bound.delete() if delete else bound.purge()
        app.close()

    def kill_decoder(self) -> bool:
        return harm.kill_a_decoder(lambda: [each.process.pid for each in self.workers])

    def wipe_temporary(self) -> bool:
        """Of one process, and what all of them share."""
        each = self.random.choice([*self.nodes, *self.workers])
        return harm.wipe(each.data_dir / "tmp") | bool(self.tmp and harm.wipe(self.tmp))

    def shift_clock(self, seconds: int) -> None:
        self.clock.shift(seconds)
        time.sleep(6.0)
        self.clock.shift(0)
        time.sleep(1.5)

    def _administer(self, statement: str) -> None:
        engine = create_engine(self.database.url(), isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as db:
                db.execute(text(statement))
        finally:
            engine.dispose()

    def supervise(self) -> int:
        """Start again what has ended by itself, because it found no database; returns how many."""
        ended = [each for each in (*self.nodes, *self.workers) if each.process.poll() is not None]
        for each in ended:
            each.start(wait=False) if isinstance(each, Node) else each.start()
        return len(ended)


_DATABASE = "FLUX_REDUX_DATABASE_URL"
