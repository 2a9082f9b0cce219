"""A client of the server's API for one task: submit, follow or poll, cancel, download.

A task is followed by its server-sent events; what they do not tell is polled. Knows no flags, no
pipeline and no database.
"""

import json
import os
import re
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import httpx
from httpx_sse import EventSource

from redux_pipelines.contract.types import OUTPUT_FORMATS
from redux_server.cli.progress import note
from redux_server.net.guard import is_http_url
from redux_server.parameters import MODELS, PredictionRequest
from redux_server.settings import LOOPBACK_HOSTS, UsageError

Json = dict[str, Any]
TRIES = 5
MAX_PAUSE_S = 60.0
# The server breaks its own silences every 15 s; who hears nothing for longer hears it through
# something that keeps it back.
SILENCE_S = 20.0
_UPLOADS = "/api/v3/media/uploads"
_PAGE = 100
_FIRST_POLL_S, _LAST_POLL_S = 0.2, 1.0
_BUSY = frozenset({429, 502, 503, 504})
_TASK_ID = re.compile(r"\w[\w.:-]{0,127}", re.ASCII)


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

    def wait(self, task: Json, show: Callable[[Json], None]) -> Json:
        """Wait until ``task`` has ended; returns it completed.

        Follows the server's stream of it. What a stream does not tell is polled: where there is
        none, where it was cut off, and where something in between keeps it back.

        ``show`` is called with the task at each change or poll.

        Raises:
            ClientError: the task failed, or the server stopped answering.
        """
        pause_s = _FIRST_POLL_S
        is_followed = True
        show(task)
        while _is_open(task):
            if is_followed:
                told = self._follow(task, show)
                is_followed = told is not None
                task = told or task
            if _is_open(task):
                self._sleep(pause_s)
                pause_s = min(_LAST_POLL_S, pause_s * 1.5)
                task = self.poll(task)
                show(task)
        if task["status"] != "completed":
            reason = task.get("error") or "the server gave no reason"
            raise ClientError(f"task {task['id']} {task['status']}: {reason}")
        return task

    def _follow(self, task: Json, show: Callable[[Json], None]) -> Json | None:
        """``task`` as a stream told of it last; None if no stream did."""
        url = f"{self._url}/api/v3/predictions/{task['id']}/stream"
        last = None
        with closing(follow(self._http, url, self._authorization)) as events:
            for data in events:
                if not _is_task(data) or data["id"] != task["id"]:
                    break
                last = data
                show(last)
                if not _is_open(last):
                    break
        return last

    def poll(self, task: Json) -> Json:
        """``task`` as it is now."""
        url = self._reachable(task["urls"]["get"])
        return self._task(self._send("GET", url, repeatable=True, headers=self._authorization))

    def cancel(self, task_id: str) -> Json:
        """Say that a task is not wanted any more; returns it as it is then.

        Raises:
            ClientError: the server knows no such task, or cannot be reached.
        """
        if not _TASK_ID.fullmatch(task_id):
            raise ClientError(f"{task_id!r} is no task's id; `flux-redux submit` prints it")
        url = f"{self._url}/api/v3/predictions/{task_id}/cancel"
        return self._task(self._send("POST", url, repeatable=True, headers=self._authorization))

    def uploads(self) -> tuple[list[Json], int, int]:
        """The key's files, newest first; how many bytes they count, and may count.

        Raises:
            ClientError: the server cannot be reached, or is none of ours.
        """
        files: list[Json] = []
        while True:
            url = f"{self._url}{_UPLOADS}?page={len(files) // _PAGE + 1}&page_size={_PAGE}"
            data = self._data(
                self._send("GET", url, repeatable=True, headers=self._authorization), "items"
            )
            files += data["items"]
            if len(data["items"]) < _PAGE:
                return files, data["stored_bytes"], data["max_stored_bytes"]

    def delete_uploads(self, ids: Sequence[str]) -> int:
        """Delete files; returns how many there were.

        Raises:
            ClientError: the server refused, or cannot be reached.
        """
        response = self._send(
            "POST",
            f"{self._url}{_UPLOADS}/delete",
            repeatable=True,
            json={"ids": list(ids)},
            headers=self._authorization,
        )
        return int(self._data(response, "deleted_count")["deleted_count"])

    def download(self, task: Json, folder: Path, *, stem: str = "") -> list[Path]:
        """Save the images of a completed task as ``{stem}-{i}.png`` (stem: its id).

        The extension is that of the output's URL.

        Output URLs carry their own permission, so the API key is not sent with them.

        Raises:
            ClientError: an image cannot be fetched, or not be written.
        """
        paths = []
        for i, url in enumerate(task.get("outputs") or ()):
            response = self._send("GET", self._reachable(url), repeatable=True)
            if response.status_code != 200:
                raise ClientError(f"image {i} of task {task['id']}: {_message(response)}")
            path = folder / f"{stem or task['id']}-{i}{_suffix(url)}"
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
        except (ValueError, KeyError, TypeError):
            task = {}
        if not _is_task(task):
            raise ClientError(_not_ours(response))
        return task

    def _data(self, response: httpx.Response, name: str) -> Json:
        """The data in an answer, which has to have something of that name."""
        if response.status_code != 200:
            raise ClientError(_message(response))
        try:
            data: Json = response.json()["data"]
            data[name]
        except (ValueError, KeyError, TypeError):
            raise ClientError(_not_ours(response)) from None
        return data

    def _reachable(self, url: str) -> str:
        """A URL of the server's, the way we reach it: proxies change scheme and port."""
        theirs, ours = urlsplit(url), urlsplit(self._url)
        if theirs.hostname == ours.hostname:
            theirs = theirs._replace(scheme=ours.scheme, netloc=ours.netloc)
        return theirs.geturl()


def follow(http: httpx.Client, url: str, headers: Mapping[str, str]) -> Generator[Json, None, None]:
    """The data of each event of the stream at ``url``, which are objects: tasks, or an error.

    Ends when the stream does, however: at its end, where there is none, when it is cut off, when
    nothing comes for ``SILENCE_S``, or at what is no event. So the last state may be untold.
    """
    asked = {"Accept": "text/event-stream", **headers}
    timeout = httpx.Timeout(SILENCE_S, connect=10.0)
    try:
        with http.stream("GET", url, headers=asked, timeout=timeout) as response:
            if response.status_code != 200:
                return
            for event in EventSource(response).iter_sse():
                if not event.data:  # a comment, or the pause before another try
                    continue
                data = json.loads(event.data)
                if not isinstance(data, dict):
                    return
                yield data
    except (httpx.HTTPError, ValueError):
        return


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


def _is_open(task: Json) -> bool:
    return task["status"] in ("created", "processing")


def _is_task(data: Any) -> bool:
    """Whether this is a task as the API has them, which other servers' answers are not."""
    try:
        is_ours = _TASK_ID.fullmatch(data["id"]) and data["urls"]["get"] and data["status"]
    except (KeyError, TypeError):
        return False
    return bool(is_ours)


def _suffix(url: str) -> str:
    """The extension in a URL; none but those of pictures are taken over."""
    suffix = PurePosixPath(urlsplit(url).path).suffix
    return suffix if suffix.removeprefix(".") in OUTPUT_FORMATS else ".png"


def _checked_url(url: str) -> str:
    if not is_http_url(url):
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


def _not_ours(response: httpx.Response) -> str:
    return f"what answers at {response.url} is not a FLUX Redux Server"


def _unreachable(url: str, error: Exception) -> str:
    parts = urlsplit(url)
    return (
        f"cannot reach the server at {parts.scheme}://{parts.netloc} ({error or type(error)}); "
        "start it with `flux-redux serve`, or say where it is with --url or FLUX_REDUX_URL"
    )


def _retry_after_s(response: httpx.Response) -> float:
    text = response.headers.get("Retry-After", "")
    return min(float(text), MAX_PAUSE_S) if re.fullmatch(r"\d{1,6}", text) else 5.0
