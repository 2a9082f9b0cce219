"""``flux-redux submit`` and ``cancel``: what a user gives, sent; what comes of it, shown and saved.

Knows no HTTP.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from redux_pipelines.contract.types import OutputFormat
from redux_server.cli.client import Client, ClientError, Json, make_folder
from redux_server.cli.progress import ProgressReport, note
from redux_server.parameters import PredictionRequest, complaint, parse_request
from redux_server.pictures.inline import MAX_BYTES, media_type
from redux_server.settings import ClientSettings, UsageError


def submit(
    settings: ClientSettings,
    *,
    image: str,
    images: Sequence[str],
    mask: str,
    wait: bool,
    out: str,
    **parameters: Any,
) -> int:
    """Send one picture; with ``wait``, save the images when they are done."""
    request = read_parameters(parameters, images=images)
    folder = Path(out)
    try:
        with closing(Client(settings.url, settings.key)) as client:
            if wait:
                make_folder(folder)
            task = client.submit(with_pictures(request, image, images, mask))
            if not wait:
                print(task["id"], task["urls"]["get"], sep="\n")
                return 0
            note(f"task {task['id']}")
            done = _wait(client, task)
            report(done, client.download(done, folder))
    except ClientError as error:
        note(str(error))
        return 1
    return 0


def cancel(settings: ClientSettings, task_id: str) -> int:
    """Cancel a task; says what became of it."""
    try:
        with closing(Client(settings.url, settings.key)) as client:
            status = client.cancel(task_id)["status"]
    except ClientError as error:
        note(str(error))
        return 1
    stops = "is being worked on, and stops at its next step"
    print(f"task {task_id} {stops if status == 'processing' else status}")
    return 0


def read_parameters(
    given: Mapping[str, Any],
    *,
    images: Sequence[str] = (),
    output_format: OutputFormat | None = None,
) -> PredictionRequest:
    """The request that the flags describe, its pictures left to fill in; complains as the API does.

    ``output_format`` is what is meant where no flag says so.

    Raises:
        UsageError: a value that the API would refuse.
    """
    others = [f"picture {place}" for place, _ in enumerate(images)]
    places = {"image": "picture", "images": others}
    implied = {} if output_format is None else {"output_format": output_format}
    try:
        return parse_request({**implied, **given, **places}, is_for_us=True)
    except ValidationError as error:
        raise UsageError(complaint(error.errors(include_url=False))) from None


def with_pictures(
    request: PredictionRequest, image: str, images: Sequence[str], mask: str
) -> PredictionRequest:
    """``request`` with the pictures that the flags name; an empty ``mask`` is none.

    Raises:
        ClientError: see ``picture``.
    """
    pictures = {
        "image": picture(image),
        "images": [picture(source) for source in images],
        "mask": picture(mask) if mask else None,
    }
    return request.model_copy(update=pictures)


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


def note_caveat(model: str) -> None:
    """Say what to expect of the pictures of ``model``, where they cannot be FLUX's."""
    from redux_pipelines.loading.load import caveat  # which `submit` itself needs not load

    if text := caveat(model):
        note(text)


def wait_shown(client: Client, task: Json) -> Json:
    """Wait until a task is completed, and show how far it is.

    Raises:
        ClientError: see ``Client.wait``.
    """
    with closing(ProgressReport()) as progress:
        return client.wait(task, lambda each: _show(progress, each))


def _show(progress: ProgressReport, task: Json) -> None:
    """How many tasks go before this one, then its steps."""
    known = task.get("progress") or {}
    step, position = known.get("step", 0), known.get("queue_position")
    if task["status"] == "created":
        detail = "" if position is None else f", {position} before it"
        progress.show("queued", detail=detail)
    elif task["status"] == "processing" and step:
        progress.show("step", step, known.get("total_steps", 0))
    elif task["status"] == "processing":
        progress.show("preparing")


def _wait(client: Client, task: Json) -> Json:
    try:
        return wait_shown(client, task)
    except KeyboardInterrupt:
        note(
            "no longer waiting; the task goes on. Fetch its result with:\n"
            f'  curl -H "Authorization: Bearer $FLUX_REDUX_KEY" {task["urls"]["get"]}\n'
            f"or end it with: flux-redux cancel {task['id']}"
        )
        raise
