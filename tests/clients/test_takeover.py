"""Clients that know no other host than api.wavespeed.ai, led here by DNS and a reverse proxy.

The proxies run with the shipped configuration, and nothing tells the clients of this server: the
name leads to loopback, and they trust the certificate's authority.
"""

import io
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clients.mcp_stdio import McpServer
from clients.roster import CLI, CURL, HUB, JAVASCRIPT, MCP_NODE, N8N, PYTHON, PYTHON_0, PYTHON_1
from clients.takeover import HOST, PROXIES, SITE, Takeover, nginx
from clients.trial import MODEL, REFUSALS, Client, Trial
from e2e.live import LiveServer, a_picture, data_uri
from e2e.seed_curl import IMAGE, RESULT, SUBMIT
from threaded import answering

pytestmark = pytest.mark.clients
BASE = f"https://{HOST}"
Begin = Callable[..., Trial]


@pytest.fixture(scope="module", params=sorted(PROXIES))
def takeover(
    request: pytest.FixtureRequest,
    live: LiveServer,
    certificates: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Takeover]:
    """Each proxy in turn, before the live server."""
    folder = tmp_path_factory.mktemp("proxy") / request.param
    with PROXIES[request.param](folder, certificates, live.port) as proxy:
        yield proxy


class Curl:
    """curl with the proxy and its authority in its configuration file, and so in no command."""

    def __init__(self, takeover: Takeover, home: Path) -> None:
        leads = [f"{name}:443:127.0.0.1:{takeover.port}" for name in (HOST, SITE)]
        lines = [f'cacert = "{takeover.ca}"', *(f'connect-to = "{lead}"' for lead in leads)]
        (home / ".curlrc").write_text("\n".join(lines))
        self._env = {"PATH": os.environ["PATH"], "HOME": str(home), "NO_PROXY": "*"}

    def shell(self, command: str, **variables: str) -> bytes:
        """What a shell command with curl in it prints."""
        env = {**self._env, **variables}
        done = subprocess.run(
            ["bash", "-c", command], env=env, capture_output=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def data(self, command: str, **variables: str) -> Any:
        """``data`` of its answer."""
        body = json.loads(self.shell(f"{command.rstrip()} --silent", **variables))
        assert body["code"] == 200, body
        return body["data"]

    def picture(self, url: str) -> Image.Image:
        """The picture at a URL of the host that was taken over."""
        assert url.startswith(f"{BASE}/files/"), url
        image = Image.open(io.BytesIO(self.shell(f"curl --silent --fail '{url}'")))
        image.load()
        return image

    def wait(self, task: str, key: str) -> Any:
        """The task once it has ended, asked for as documented."""
        for _ in range(600):
            found = self.data(RESULT, WAVESPEED_API_KEY=key, requestId=task)
            if found["status"] in ("completed", "failed"):
                return found
            time.sleep(0.2)
        raise AssertionError(found)


@pytest.fixture
def curl(takeover: Takeover, tmp_path: Path) -> Curl:
    return Curl(takeover, tmp_path)


# --- clients --------------------------------------------------------------------------------------


def check(user: Trial, curl: Curl, urls: list[str]) -> None:
    """The pictures must be right, at URLs of the host that was asked."""
    assert urls
    for url in urls:
        assert curl.picture(url).tobytes() == user.reference.pixels(user.body)


def test_documented_commands_work_as_they_are(trial: Begin, curl: Curl) -> None:
    user = trial(CURL, "takeover")
    submit = SUBMIT.replace(IMAGE, user.body["image"]).replace("1024*1024", "512*512")
    task = curl.data(submit, WAVESPEED_API_KEY=user.key)
    assert task["urls"]["get"].startswith(f"{BASE}/api/")
    ended = curl.wait(task["id"], user.key)
    assert ended["status"] == "completed", ended
    assert curl.picture(ended["outputs"][0]).size == (512, 512)


@pytest.mark.parametrize(
    ("client", "cases"),
    [
        (PYTHON, ("run", "upload", "sync")),
        (PYTHON_1, ("upload",)),
        (PYTHON_0, ("run",)),
        (JAVASCRIPT, ("run", "upload", "sync")),
    ],
    ids=lambda each: f"{each.pins}" if isinstance(each, Client) else "",
)
def test_sdk_without_a_base_url(
    trial: Begin, takeover: Takeover, curl: Curl, client: Client, cases: tuple[str, ...]
) -> None:
    user = trial(client, "takeover")
    sandbox = user.sandbox(takeover.names, **takeover.trust)
    answers = sandbox.drive(client.driver, user.job(url=""))
    for case in cases:
        assert "value" in answers[case], answers[case]
        check(user, curl, answers[case]["value"])
    assert REFUSALS["bad key"] in answers["bad key"]["error"] or client is PYTHON_0
    assert sandbox.left_loopback == []


def test_hub_without_a_base_url(trial: Begin, takeover: Takeover) -> None:
    user = trial(HUB, "takeover")
    sandbox = user.sandbox(takeover.names, **takeover.trust)
    answers = sandbox.drive(HUB.driver, user.job(url=""))
    for case in ("run", "local file"):
        assert "value" in answers[case], answers[case]
        user.check_picture(answers[case]["value"][0])
    assert sandbox.left_loopback == []


def test_command_line_without_configuration(trial: Begin, takeover: Takeover) -> None:
    user = trial(CLI, "takeover")
    (user.home / ".config/wavespeed-nodejs/config.json").unlink(missing_ok=True)
    sandbox = user.sandbox(takeover.names, **takeover.trust, WAVESPEED_API_KEY=user.key)
    done = sandbox.run("wavespeed", "run", MODEL, *user.inputs(), "--download", "led.png", "--json")
    assert json.loads(done.stdout)["outputs"][0].startswith(f"{BASE}/files/")
    user.check_picture(str(user.home / "led.png"))
    assert sandbox.left_loopback == []


def test_mcp_server_without_a_base_url(trial: Begin, takeover: Takeover, curl: Curl) -> None:
    user = trial(MCP_NODE, "takeover")
    sandbox = user.sandbox(takeover.names, **takeover.trust, WAVESPEED_API_KEY=user.key)
    with McpServer(sandbox, "wavespeed-mcp") as server:
        wanted = {**user.body, "image": "@./icon.png"}
        check(user, curl, server.call("run_model", model=MODEL, input=wanted).json["outputs"])
    assert sandbox.left_loopback == []


def test_requests_as_n8n_sends_them(trial: Begin, curl: Curl, tmp_path: Path) -> None:
    """Read from its node's source: content type also without a body, the poll, the download."""
    user = trial(N8N, "takeover")
    headers = (
        f"-H 'Authorization: Bearer {user.key}' -H 'Content-Type: application/json' "
        "-H 'X-Client-Name: n8n-nodes-wavespeed' -H 'X-Client-Version: 0.1.0' "
        "-H 'Accept: application/json,text/html,application/xhtml+xml,*/*;q=0.8'"
    )
    assert curl.data(f"curl {headers} {BASE}/api/v3/balance")["balance"] >= 0
    (tmp_path / "body.json").write_text(json.dumps(user.body))
    submit = f"curl {headers} --data-binary @{tmp_path / 'body.json'} {BASE}/api/v3/{MODEL}"
    task = curl.data(submit)["id"]
    curl.wait(task, user.key)
    ended = curl.data(f"curl {headers} {BASE}/api/v3/predictions/{task}/result")
    check(user, curl, ended["outputs"])
    assert ended["outputs"][0].endswith(".png"), "it names its file after the URL"


def test_catalogue_is_answered_under_the_name_of_the_site(trial: Begin, curl: Curl) -> None:
    """Where ComfyUI's dynamic nodes ask for it: not at the API's name."""
    trial(CURL, "catalogue")
    path = f"/center/default/api/v1/model_product/detail/{MODEL}"
    assert curl.data(f"curl https://{SITE}{path}")["model_uuid"] == MODEL


# --- what a proxy may break -----------------------------------------------------------------------


def a_large_picture() -> bytes:
    """Noise, which does not compress: just under the 20 MiB that the server takes."""
    noise = np.random.default_rng(7).integers(0, 256, (2600, 2600, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG", compress_level=0)
    assert 19 * 2**20 < buffer.tell() < 20 * 2**20
    return buffer.getvalue()


def test_largest_picture_goes_through_as_file_and_inline(
    trial: Begin, takeover: Takeover, curl: Curl, tmp_path: Path
) -> None:
    user = trial(CURL, "20 MiB through a proxy")
    place = tmp_path / "large.png"
    place.write_bytes(a_large_picture())
    auth = f"-H 'Authorization: Bearer {user.key}'"
    up = curl.data(f"curl {auth} -F 'file=@{place}' {BASE}/api/v3/media/upload/binary")
    assert up["size"] == place.stat().st_size
    script = (
        f"python3 -c \"import base64, json, pathlib; b = pathlib.Path('{place}').read_bytes(); "
        "print(json.dumps(dict(image=base64.b64encode(b).decode(), size='512*512', "
        'num_inference_steps=1)))"'
    )
    inline = f"{script} | curl {auth} --data-binary @- {BASE}/api/v3/{MODEL}"
    (tmp_path / "url.json").write_text(json.dumps({**user.body, "image": up["download_url"]}))
    by_url = f"curl {auth} --data-binary @{tmp_path / 'url.json'} {BASE}/api/v3/{MODEL}"
    for command in (inline, by_url):
        ended = curl.wait(curl.data(command)["id"], user.key)
        assert ended["status"] == "completed", ended


def test_events_come_through_one_by_one(trial: Begin, curl: Curl, tmp_path: Path) -> None:
    user = trial(CURL, "events through a proxy")
    wanted = {**user.body, "size": "1024*1024", "num_inference_steps": 50}
    (tmp_path / "body.json").write_text(json.dumps(wanted))
    auth = f"-H 'Authorization: Bearer {user.key}'"
    task = curl.data(f"curl {auth} --data-binary @{tmp_path / 'body.json'} {BASE}/api/v3/{MODEL}")
    stamp = 'while read -r line; do echo "$(date +%s.%N) $line"; done'
    stream = f"{BASE}/api/v3/predictions/{task['id']}/stream"
    lines = curl.shell(f"curl --silent --no-buffer {auth} {stream} | {stamp}").decode()
    events = [line.split() for line in lines.splitlines() if " event: " in line]
    assert [name for *_, name in events][-1] == "end"
    assert len(events) >= 3
    first, last = float(events[0][0]), float(events[-1][0])
    assert last - first > 0.5, "all of them came at once"


class _Slow(BaseHTTPRequestHandler):
    """Answers a POST after longer than a proxy waits by default."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(65)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.slow
def test_nginx_waits_for_sync_mode_longer_than_its_default(
    certificates: Path, tmp_path: Path
) -> None:
    with (
        answering(ThreadingHTTPServer(("127.0.0.1", 0), _Slow)) as upstream,
        nginx(tmp_path / "nginx", certificates, upstream.server_port) as proxy,
    ):
        curl = Curl(proxy, tmp_path)
        answer = curl.shell(f"curl --silent --fail -d '{{}}' {BASE}/api/v3/{MODEL}")
    assert answer == b"{}"


def test_public_url_needs_nothing_of_the_proxy(tmp_path: Path) -> None:
    """A proxy elsewhere is not believed; then the flag says where we are."""
    with LiveServer(tmp_path / "data", "--public-url", BASE) as server:
        body = {"image": data_uri(a_picture()), "size": "512*512"}
        assert server.submit(body)["urls"]["get"].startswith(f"{BASE}/api/v3/predictions/")
