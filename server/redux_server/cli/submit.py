"""``flux-redux submit`` and ``cancel``: what a user gives, sent; what comes of it, shown and saved.

Knows no HTTP.
"""

import argparse
import base64
import re
from contextlib import closing
from pathlib import Path

from pydantic import ValidationError

from redux_pipelines.contract.types import OutputFormat
from redux_pipelines.loading.load import caveat
from redux_server.cli.client import Client, ClientError, Json, make_folder, note
from redux_server.cli.progress import ProgressReport
from redux_server.parameters import PredictionRequest, complaint, parse_request
from redux_server.pictures.inline import MAX_BYTES, media_type
from redux_server.settings import ClientSettings, UsageError

_PICTURES = ("image", "images", "mask")
_PARAMETERS = frozenset(PredictionRequest.model_fields).difference(_PICTURES)


def submit(given: argparse.Namespace, settings: ClientSettings) -> int:
    """Send one picture; with ``--wait``, save the images when they are done."""
    request = read_parameters(given)
    folder = Path(given.out)
    try:
        with closing(Client(settings.url, settings.key)) as client:
            if given.wait:
                make_folder(folder)
            task = client.submit(with_pictures(request, given))
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


def cancel(task_id: str, settings: ClientSettings) -> int:
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
    given: argparse.Namespace, *, output_format: OutputFormat | None = None
) -> PredictionRequest:
    """The request that the flags describe, its pictures left to fill in; complains as the API does.

    ``output_format`` is what is meant where no flag says so.

    Raises:
        UsageError: a value that the API would refuse.
    """
    flags = {name: value for name, value in vars(given).items() if name in _PARAMETERS}
    others = [f"picture {place}" for place, _ in enumerate(getattr(given, "images", ()))]
    places = {"image": "picture", "images": others}
    implied = {} if output_format is None else {"output_format": output_format}
    try:
        return parse_request({**implied, **flags, **places})
    except ValidationError as error:
        raise UsageError(complaint(error.errors(include_url=False))) from None


def with_pictures(request: PredictionRequest, given: argparse.Namespace) -> PredictionRequest:
    """``request`` with the pictures that the flags name.

    Raises:
        ClientError: see ``picture``.
    """
    pictures = {
        "image": picture(given.image),
        "images": [picture(source) for source in given.images],
        "mask": picture(given.mask) if given.mask else None,
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
