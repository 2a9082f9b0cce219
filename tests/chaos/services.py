"""A PostgreSQL, a RabbitMQ and an S3 of our own, which may be killed: others use nothing of them.

Each lives in a folder and at ports of its own, and comes back with its data after ``kill``; only
the S3 keeps its pictures in memory, and is therefore cut off, not killed.
"""

import os
import shutil
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from e2e.live import children, free_port, is_running, wait_until

BUCKET = "pictures"
_START_S = 600.0  # a broker on a busy machine takes its time


class Missing(Exception):
    """A program that a scenario needs is not installed."""


class Service(ABC):
    """A server process, from ``start`` to ``stop``; ``kill`` ends it and all that it started."""

    name = ""
    user = ""  # whom it runs as when we are root, which the real ones refuse to be

    def __init__(self, folder: Path) -> None:
        self.folder = folder / self.name
        self.folder.mkdir(mode=0o755)
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        if self.user and os.geteuid() == 0:
            shutil.chown(self.folder, self.user)

    @abstractmethod
    def command(self) -> Sequence[str]: ...

    def environment(self) -> Mapping[str, str]:
        return os.environ

    @abstractmethod
    def is_up(self) -> bool: ...

    def start(self, *, wait: bool = True) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=dict(self.environment()), start_new_session=True, **self.identity(),
            )  # fmt: skip
        if wait:
            self.wait_up()

    def wait_up(self) -> None:
        wait_until(self.is_up, _START_S, what=lambda: f"no {self.name}:\n{self.log}", every_s=0.2)

    def kill(self) -> None:
        """SIGKILL to it and its children: what a machine without power does."""
        assert self.process is not None
        family = [self.process.pid]
        for pid in family:
            family += children(pid)
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        for pid in family:
            wait_until(lambda pid=pid: not is_running(pid), 10, must=False)

    def signal(self, number: int) -> None:
        """Send ``number`` to it and its children."""
        assert self.process is not None
        for pid in [self.process.pid, *children(self.process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def identity(self) -> dict[str, Any]:
        if not self.user or os.geteuid() != 0:
            return {}
        return {"user": self.user, "group": self.user, "extra_groups": []}

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-3000:]


class Postgres(Service):
    name = "postgresql"
    user = "postgres"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        initdb = str(found[-1]) if found else shutil.which("initdb")
        if initdb is None:
            raise Missing("no PostgreSQL server here (its initdb was not found)")
        self.programs = Path(initdb).parent
        self.data = self.folder / "data"
        made = ["-D", str(self.data), "-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8"]
        subprocess.run(
            [initdb, *made], cwd=self.folder, check=True, stdout=subprocess.DEVNULL,
            **self.identity(),
        )  # fmt: skip

    def command(self) -> Sequence[str]:
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": 300,
        }
        given = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [str(self.programs / "postgres"), "-D", str(self.data), *given]

    def is_up(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:  # the killed one was not quite gone
            self.start(wait=False)
        asked = [self.programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(asked, check=False).returncode == 0

    def url(self, port: int = 0) -> str:
        """Where to find it, or a proxy before it."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{port or self.port}/postgres"


class RabbitMQ(Service):
    name = "rabbitmq"
    user = "rabbitmq"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        found = sorted(Path("/usr/lib/rabbitmq/lib").glob("*/sbin/rabbitmq-server"))
        program = str(found[-1]) if found else shutil.which("rabbitmq-server")
        if program is None:
            raise Missing("no RabbitMQ here (rabbitmq-server was not found)")
        self.program = program
        self.node_port = free_port()

    def command(self) -> Sequence[str]:
        return [self.program]

    def environment(self) -> Mapping[str, str]:
        here = str(self.folder)
        return {
            "PATH": os.environ["PATH"],
            "HOME": here,
            "RABBITMQ_NODENAME": f"chaos{self.port}@localhost",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_DIST_PORT": str(self.node_port),
            "RABBITMQ_MNESIA_BASE": f"{here}/data",
            "RABBITMQ_LOG_BASE": f"{here}/logs",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{here}/enabled_plugins",
            "RABBITMQ_CONF_ENV_FILE": f"{here}/rabbitmq-env.conf",
            "RABBITMQ_CONFIG_FILE": f"{here}/rabbitmq.conf",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_FLAGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            # Idle schedulers that spin would take the cores from all the rest.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +S 1:1",
        }

    def is_up(self) -> bool:
        from kombu import Connection

        try:
            with Connection(self.url(), connect_timeout=3) as connection:
                connection.connect()
            return True
        except Exception:  # whatever the client raises of a broker that half listens
            assert self.process is not None
            if self.process.poll() is not None:
                self.start(wait=False)
            return False

    def url(self, port: int = 0) -> str:
        """Where to find it, or a proxy before it."""
        return f"amqp://guest:guest@127.0.0.1:{port or self.port}//"


class S3(Service):
    name = "s3"

    def command(self) -> Sequence[str]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]

    def is_up(self) -> bool:
        with suppress(httpx.TransportError):
            made = httpx.put(f"{self.url()}/{BUCKET}", trust_env=False, timeout=10)
            return made.status_code in (200, 409)
        return False

    def url(self, port: int = 0) -> str:
        """Where to find it, or a proxy before it."""
        return f"http://127.0.0.1:{port or self.port}"

    def variables(self, port: int = 0) -> dict[str, str]:
        """What leads a client of S3 to it."""
        return {
            "AWS_ENDPOINT_URL": self.url(port),
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing-secret",
            "AWS_ALLOW_HTTP": "true",
            "AWS_METADATA_ENDPOINT": "http://127.0.0.1:9",  # never to the real one
        }
