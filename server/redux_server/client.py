"""``flux-redux submit``: a client of the server's API, and how a task's progress is shown.

Knows the API of one task (submit, poll, download). Knows no pipeline and no storage.
"""

import argparse
import base64
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from pydantic import ValidationError

from redux_pipelines.loading import caveat
from redux_server.cli import UsageError
from redux_server.inline_image import MAX_BYTES, media_type
from redux_server.progress import ProgressReport
from redux_server.schemas import MODELS, PredictionRequest, complaint, parse_request
from redux_server.settings import LOOPBACK_HOSTS, ClientSettings

TRIES = 5
MAX_PAUSE_S = 60.0
_FIRST_POLL_S, _LAST_POLL_S = 0.2, 1.0
_BUSY = frozenset({429, 502, 503, 504})
_PARAMETERS = frozenset(PredictionRequest.model_fields) - {"image"}
_TASK_ID = re.compile(r"\w[\w.:-]{0,127}", re.ASCII)

Json = dict[str, Any]


class ClientError(Exception):
    """What went wrong between us and the server; the text is for the user."""


class Client:
    """Submits tasks to the server at ``url``, waits for them and fetches their images.

    A submit is repeated only when the server said that it took nothing (429); a second task must
    never come of an answer that was lost. Raises ``UsageError`` for a URL or key of no use.
    """

    def __init__(self, url: str, key: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._url = _checked_url(url)
        self._sleep = sleep
        self._authorization = {"Authorization": f"Bearer {_checked_key(key)}"}
        # A proxy meant for the internet does not know this machine's loopback.
        is_local = urlsplit(self._url).hostname in LOOPBACK_HOSTS
        timeout = httpx.Timeout(60.0, connect=10.0)
        self._http = httpx.Client(timeout=timeout, trust_env=not is_local)

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def submit(self, request: PredictionRequest) -> Json:
        """Send a request; returns the task as the server sees it.

        Raises:
            ClientError: the server refused it or cannot be reached.
        """
        response = self._send(
            "POST",
            f"{self._url}/api/v3/{MODELS[0]}",
            repeatable=False,
            json=request.model_dump(),
            headers=self._authorization,
        )
        return self._task(response)

    def wait(self, task: Json, show: Callable[[str, int, int], None]) -> Json:
        """Poll until ``task`` has ended; returns it completed.

        ``show`` is called with state, step and total steps at each poll.

        Raises:
            ClientError: the task failed, or the server stopped answering.
        """
        pause_s = _FIRST_POLL_S
        while task["status"] in ("created", "processing"):
            show(*_state(task))
            self._sleep(pause_s)
            pause_s = min(_LAST_POLL_S, pause_s * 1.5)
            task = self.poll(task)
        if task["status"] != "completed":
            reason = task.get("error") or "the server gave no reason"
            raise ClientError(f"task {task['id']} {task['status']}: {reason}")
        return task

    def poll(self, task: Json) -> Json:
        """``task`` as it is now."""
        url = self._reachable(task["urls"]["get"])
        return self._task(self._send("GET", url, repeatable=True, headers=self._authorization))

    def download(self, task: Json, folder: Path, *, stem: str = "") -> list[Path]:
        """Save the images of a completed task as ``{stem}-{i}.png`` (stem: its id).

        Output URLs carry their own permission, so the API key is not sent with them.

        Raises:
            ClientError: an image cannot be fetched, or not be written.
        """
        paths = []
        for i, url in enumerate(task.get("outputs") or ()):
            response = self._send("GET", self._reachable(url), repeatable=True)
            if response.status_code != 200:
                raise ClientError(f"image {i} of task {task['id']}: {_message(response)}")
            path = folder / f"{stem or task['id']}-{i}.png"
            save(path, response.content)
            paths.append(path)
        return paths

    def _send(self, method: str, url: str, *, repeatable: bool, **extra: Any) -> httpx.Response:
        """Send a request, and send it again where that is safe and may help."""
        again = _BUSY if repeatable else {429}
        for attempt in range(1, TRIES + 1):
            try:
                response = self._http.request(method, url, **extra)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                if not repeatable or attempt == TRIES:
                    raise ClientError(_unreachable(url, error)) from error
                pause_s = float(attempt)
            else:
                if response.status_code not in again or attempt == TRIES:
                    break
                pause_s = _retry_after_s(response)
                if not repeatable:
                    note(f"{_message(response)} Next try in {pause_s:g} s.")
            self._sleep(pause_s)
        return response

    def _task(self, response: httpx.Response) -> Json:
        """The task in an answer."""
        if response.status_code != 200:
            raise ClientError(_message(response))
        try:
            task: Json = response.json()["data"]
            is_ours = (
                bool(_TASK_ID.fullmatch(task["id"])) and task["urls"]["get"] and task["status"]
            )
        except (ValueError, KeyError, TypeError):
            is_ours = False
        if not is_ours:
            raise ClientError(f"what answers at {response.url} is not a FLUX Redux Server")
        return task

    def _reachable(self, url: str) -> str:
        """A URL of the server's, the way we reach it: proxies change scheme and port."""
        theirs, ours = urlsplit(url), urlsplit(self._url)
        if theirs.hostname == ours.hostname:
            theirs = theirs._replace(scheme=ours.scheme, netloc=ours.netloc)
        return theirs.geturl()


def submit(given: argparse.Namespace, settings: ClientSettings) -> int:
    """Send one picture; with ``--wait``, save the images when they are done."""
    request = read_parameters(given)
    folder = Path(given.out)
    try:
        with closing(Client(settings.url, settings.key)) as client:
            if given.wait:
                make_folder(folder)
            task = client.submit(request.model_copy(update={"image": picture(given.image)}))
            if not given.wait:
                print(task["id"], task["urls"]["get"], sep="\n")
                return 0
            note(f"task {task['id']}")
            done = _wait(client, task)
            report(done, client.download(done, folder))
    except ClientError as error:
        note(str(error))
        return 1
    return 0


def read_parameters(given: argparse.Namespace) -> PredictionRequest:
    """The request that the flags describe, its image left to fill in; complains in the API's words.

    Raises:
        UsageError: a value that the API would refuse.
    """
    flags = {name: value for name, value in vars(given).items() if name in _PARAMETERS}
    try:
        return parse_request({**flags, "image": "-"})
    except ValidationError as error:
        raise UsageError(complaint(error.errors(include_url=False))) from None


def picture(source: str) -> str:
    """``source`` as the API takes it: a URL as it is, a file as a data URI of its true type.

    Raises:
        ClientError: a file that cannot be read or is too large.
    """
    if re.match(r"https?://", source, re.IGNORECASE):
        return source
    path = Path(source)
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_BYTES:
            raise ClientError(
                f"{source} has {size_bytes / 2**20:.1f} MiB; allowed are {MAX_BYTES >> 20} MiB"
            )
        data = path.read_bytes()
    except OSError as error:
        raise ClientError(f"cannot read {source}: {error.strerror}; give a file or a URL") from None
    return f"data:{media_type(data)};base64,{base64.b64encode(data).decode()}"


def report(task: Json, paths: list[Path]) -> None:
    """Print the files of a completed task; say its seeds and what was withheld."""
    if task.get("seeds"):
        note("seed " + ", ".join(str(seed) for seed in task["seeds"]))
    for path, is_flagged in zip(paths, task.get("has_nsfw_contents") or (), strict=False):
        if is_flagged:
            note(f"{path} is black: the safety checker withheld the image")
    for path in paths:
        print(path)


def note(text: str) -> None:
    """Tell the user something on standard error."""
    print(f"flux-redux: {text}", file=sys.stderr, flush=True)


def note_caveat(model: str) -> None:
    """Say what to expect of the pictures of ``model``, where they cannot be FLUX's."""
    if text := caveat(model):
        note(text)


def make_folder(folder: Path) -> None:
    """Create ``folder`` if need be.

    Raises:
        ClientError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClientError(f"cannot create {folder}: {error.strerror}") from None


def save(path: Path, data: bytes) -> None:
    """Write a file that is either whole or not there.

    Raises:
        ClientError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise ClientError(f"cannot write {path}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def _wait(client: Client, task: Json) -> Json:
    try:
        with closing(ProgressReport()) as progress:
            return client.wait(task, progress.show)
    except KeyboardInterrupt:
        note(
            "no longer waiting; the task goes on. Fetch its result with:\n"
            f'  curl -H "Authorization: Bearer $FLUX_REDUX_KEY" {task["urls"]["get"]}'
        )
        raise


def _state(task: Json) -> tuple[str, int, int]:
    if task["status"] == "created":
        return "queued", 0, 0
    progress = task.get("progress") or {}
    step = progress.get("step", 0)
    return ("step", step, progress.get("total_steps", 0)) if step else ("preparing", 0, 0)


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        is_usable = is_usable and (parts.port is None or parts.port > 0)
    except ValueError:
        is_usable = False
    if not is_usable:
        raise UsageError(f"--url must be like http://127.0.0.1:8000, got {url!r}")
    return url.rstrip("/")


def _checked_key(key: str) -> str:
    key = key.strip()
    if not key:
        raise UsageError(
            "no API key; set FLUX_REDUX_KEY or give --key. "
            "On the server, `flux-redux keys create --name me` makes one"
        )
    if not (key.isascii() and key.isprintable()):
        raise UsageError("the API key has characters that no key has; copy it again")
    return key


def _message(response: httpx.Response) -> str:
    """What the server has to say about an answer other than 200."""
    if response.has_redirect_location:
        return f"{response.url} redirects to {response.headers['Location']}; correct --url"
    try:
        message = response.json()["message"]
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {response.status_code} {response.reason_phrase} from {response.url}"
    return str(message)


def _unreachable(url: str, error: Exception) -> str:
    parts = urlsplit(url)
    return (
        f"cannot reach the server at {parts.scheme}://{parts.netloc} ({error or type(error)}); "
        "start it with `flux-redux serve`, or say where it is with --url or FLUX_REDUX_URL"
    )


def _retry_after_s(response: httpx.Response) -> float:
    text = response.headers.get("Retry-After", "")
    return min(float(text), MAX_PAUSE_S) if re.fullmatch(r"\d{1,6}", text) else 5.0
