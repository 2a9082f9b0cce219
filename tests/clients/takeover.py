"""The hosted service's names on loopback: the reverse proxies of deploy/takeover, as shipped.

What differs from the shipped files is the port, the folder of the certificates, and that nothing is
written outside a folder of the test's.
"""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from clients.environments import ROOT
from e2e.live import free_port, terminate, wait_until

HOST = "api.wavespeed.ai"
SITE = "wavespeed.ai"
SHIPPED = ROOT / "deploy/takeover"
_PLACE = "/etc/flux-redux"
_UPSTREAM = "127.0.0.1:8000"


@dataclass(frozen=True)
class Takeover:
    """A proxy that answers for both hosts at ``port`` of loopback; ``ca`` is whom to trust."""

    port: int
    ca: Path

    @property
    def names(self) -> dict[str, int]:
        """Where a sandbox is to find the hosts."""
        return {f"{name}:443": self.port for name in (HOST, SITE)}

    @property
    def trust(self) -> dict[str, str]:
        """Variables by which requests, httpx and node trust the authority."""
        names = ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS")
        return dict.fromkeys(names, str(self.ca))


def make_certificates(folder: Path) -> Path:
    """A folder with what ``make-certificates.sh`` makes."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    script = str(SHIPPED / "make-certificates.sh")
    subprocess.run([script, str(folder), "2"], check=True, capture_output=True, timeout=60)
    return folder


@contextmanager
def nginx(folder: Path, certificates: Path, upstream_port: int) -> Iterator[Takeover]:
    """nginx with the shipped configuration before a server on ``upstream_port``."""
    program = _program("nginx")
    port = free_port()
    folder.mkdir()
    (folder / "takeover.conf").write_text(
        _shipped(
            "nginx.conf", certificates, upstream_port, {"listen 443": f"listen 127.0.0.1:{port}"}
        )
    )
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "\n".join(f"{kind}_temp_path {folder / kind};" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"{'user root;' if os.getuid() == 0 else ''}\n"
        f"daemon off; pid {folder / 'pid'}; error_log {folder / 'error.log'};\n"
        f"events {{}}\nhttp {{\n{temporary}\ninclude {folder / 'takeover.conf'};\n}}\n"
    )
    command = [program, "-p", str(folder), "-c", str(folder / "nginx.conf")]
    with _running([*command, "-e", str(folder / "error.log")], folder, port):
        yield Takeover(port, certificates / "ca.crt")


@contextmanager
def caddy(folder: Path, certificates: Path, upstream_port: int) -> Iterator[Takeover]:
    """Caddy with the shipped configuration before a server on ``upstream_port``."""
    program = _program("caddy")
    port = free_port()
    folder.mkdir()
    options = "{\nadmin off\nauto_https disable_redirects\nservers {\nprotocols h1 h2\n}\n}\n"
    named = f"{HOST}:{port}, {SITE}:{port}"
    site = {f"\n{HOST}, {SITE} {{": f"\n{options}\n{named} {{\nbind 127.0.0.1\n"}
    (folder / "Caddyfile").write_text(_shipped("Caddyfile", certificates, upstream_port, site))
    command = [program, "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]
    with _running(command, folder, port):
        yield Takeover(port, certificates / "ca.crt")


PROXIES = {"nginx": nginx, "caddy": caddy}


def _program(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def _shipped(name: str, certificates: Path, port: int, changes: Mapping[str, str]) -> str:
    """A shipped file with other places in it; each must have been there."""
    text = (SHIPPED / name).read_text()
    ours = {_PLACE: str(certificates), _UPSTREAM: f"127.0.0.1:{port}", **changes}
    for shipped, here in ours.items():
        assert shipped in text, f"{name} does not say {shipped!r}"
        text = text.replace(shipped, here)
    return text


@contextmanager
def _running(command: list[str], folder: Path, port: int) -> Iterator[None]:
    log = folder / "output.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(lambda: _listens(port, process), 30, what=lambda: log.read_text()[-3000:])
        yield
    finally:
        terminate(process, 10)


def _listens(port: int, process: "subprocess.Popen[bytes]") -> bool:
    assert process.poll() is None, "the proxy ended"
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
