"""Runs an installed client as its user would, but with a home of its own and no way off loopback.

Its interpreter, Python or Node, loads a guard at its start: an attempt to reach another machine is
refused and noted in ``left_loopback``. For Go, Java and PHP the driver does this, in the transport
that its language has for all. The client itself is not changed.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from clients.environments import Environment, checkout

HERE = Path(__file__).parent
GUARD = HERE / "guard"
DRIVERS = HERE / "drivers"
KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")
# What packages of these environments would call home with, in their own words.
QUIET = {
    "DO_NOT_TRACK": "1",
    "LANGCHAIN_TRACING_V2": "false",
    "LANGSMITH_TRACING": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "NO_UPDATE_NOTIFIER": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}


@dataclass(frozen=True)
class Sandbox:
    """A user of one client: their home, their environment variables, their client.

    ``names`` leads a host's port to a port of this machine: {"api.example.com:443": 8443}.
    """

    client: Environment
    home: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, int] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.home / "left-loopback.txt"

    @property
    def left_loopback(self) -> list[str]:
        """What the client tried to reach elsewhere."""
        return self.log.read_text().splitlines() if self.log.exists() else []

    @property
    def environment(self) -> dict[str, str]:
        """The client's variables: nothing of ours but a path and a language."""
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        guard = {
            "PYTHONPATH": str(GUARD),
            "NODE_OPTIONS": f"--require={GUARD / 'stay.cjs'}",
            "NODE_PATH": str(self.client.modules),
            "LEFT_LOOPBACK": str(self.log),
            "LOCAL_NAMES": json.dumps(dict(self.names)),
        }
        own = {"HOME": str(self.home), "PATH": self.client.path, "NO_PROXY": "*"}
        return {**kept, **QUIET, **guard, **own, **self.variables}

    def run(
        self,
        *command: str,
        must: bool = True,
        timeout_s: float = 120,
        **variables: str,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command in the home; with ``must``, another end than 0 is an assertion error."""
        done = subprocess.run(
            command,
            cwd=self.home,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0 or not must, (done.returncode, done.stdout, done.stderr)
        return done

    def drive(self, driver: str, job: Mapping[str, Any], *, timeout_s: float = 240) -> Any:
        """What ``drivers/<driver>`` made of ``job``, by the client's own interpreter.

        It reads the job from the file named first and writes its JSON to the one named second;
        what the client prints is not looked at.
        """
        given, answer = self.home / "job.json", self.home / "answer.json"
        given.write_text(json.dumps(dict(job)))
        answer.unlink(missing_ok=True)
        command = self._interpreter(driver, str(job.get("source", "")))
        done = self.run(*command, str(given), str(answer), timeout_s=timeout_s)
        assert answer.exists(), (done.stdout, done.stderr)
        return json.loads(answer.read_text())

    def _interpreter(self, driver: str, source: str) -> list[str]:
        """What runs a driver; skips the test where it is not installed."""
        place = str(DRIVERS / driver)
        match Path(driver).suffix:
            case ".cjs" | ".mjs":
                return ["node", place]
            case ".php":
                return [installed("php"), "-d", "allow_url_fopen=0", place]
            case ".java":
                # Classes and libraries as its own build leaves them; the driver is compiled anew.
                classes = f"{source}/target/classes:{source}/target/lib/*"
                return [installed("java"), "-cp", classes, place]
            case ".go":
                return [checkout(f"bin/{Path(driver).stem}")]
            case _:
                return [self.client.python, place]


def installed(program: str) -> str:
    """Where a program is; skips the test where it is not."""
    if (found := shutil.which(program)) is None:
        pytest.skip(f"{program} is not installed")
    return found
