"""Streams of a task's events, whole and broken, for the stub that clients meet."""

import json
from typing import Any

from server.api_stub import STREAM, Stream, Stub


def event(name: str, data: Any) -> bytes:
    return f"event: {name}\nid: x\ndata: {json.dumps(data)}\n\n".encode()


def progress(stub: Stub, step: int) -> bytes:
    known = {"step": step, "total_steps": 28}
    return event("progress", stub.task("processing", progress=known)["data"])


def begin(stub: Stub) -> bytes:
    """What a stream tells of a task that waits and is then begun."""
    waits = {"step": 0, "total_steps": 28, "queue_position": 3}
    waiting = event("progress", stub.task("created", progress=waits)["data"])
    return b"retry: 2000\n\n" + waiting + b":\n\n" + progress(stub, 1) + progress(stub, 14)


def offer(stub: Stub, kind: str, done: dict[str, Any]) -> None:
    """A stream of this kind, or what stands in its place."""
    whole = begin(stub) + event("end", done["data"])
    of_another = event("end", {**done["data"], "id": "other"})
    streams: dict[str, Stream] = {
        "whole": Stream(whole),
        "cut off": Stream(begin(stub), is_cut=True),
        "cut off in an event": Stream(whole[:-100], is_cut=True),
        "over before the end": Stream(begin(stub)),
        "silent": Stream(begin(stub), is_held=True),
        "silent from the first": Stream(b"", is_held=True),
        "empty": Stream(b""),
        "not JSON": Stream(b"data: hello\n\n" + whole),
        "no object": Stream(b"data: [1]\n\n" + whole),
        "no task": Stream(b"data: {}\n\n" + whole),
        "of another task": Stream(of_another),
    }
    if kind in streams:
        stub.answers(STREAM, streams[kind])
        stub.answers(STREAM, {"message": "No more streams"}, status=503)
    elif kind == "a page":
        stub.answers(STREAM, b"<html>", Content_Type="text/html")
    elif kind != "missing":
        stub.answers(STREAM, {"message": "No."}, status=int(kind))
