"""Reads a task's server-sent events, as a client. Knows no polling and no command line."""

import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import httpx

# The server breaks its own silences every 15 s; who hears nothing for longer hears it through
# something that keeps it back.
SILENCE_S = 20.0

Json = dict[str, Any]


def follow(http: httpx.Client, url: str, headers: Mapping[str, str]) -> Generator[Json, None, None]:
    """The data of each event of the stream at ``url``, which are objects: tasks, or an error.

    Ends when the stream does, however: at its end, where there is none, when it is cut off, when
    nothing comes for ``SILENCE_S``, or at what is no event. So the last state may be untold.
    """
    asked = {"Accept": "text/event-stream", **headers}
    timeout = httpx.Timeout(SILENCE_S, connect=10.0)
    try:
        with http.stream("GET", url, headers=asked, timeout=timeout) as response:
            kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
            if response.status_code != 200 or kind != "text/event-stream":
                return
            for text in _data(response.iter_lines()):
                data = json.loads(text)
                if not isinstance(data, dict):
                    return
                yield data
    except (httpx.HTTPError, ValueError):
        return


def _data(lines: Iterable[str]) -> Iterator[str]:
    """The data of each event; of the standard's grammar, what we use."""
    data: list[str] = []
    for line in lines:
        field, _, value = line.partition(":")
        if field == "data":
            data.append(value.removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data = []
