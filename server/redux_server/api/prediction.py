"""The prediction object: a task as its owner sees it, in an answer, a poll or a webhook.

Its URLs are absolute, and signed for as long as the images are kept. Field names are those of the
hosted service's documentation. Knows neither requests nor responses.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from redux_server.settings import ServerSettings
from redux_server.storage.signing import Signer
from redux_server.tasks.task import Outcome, Status, Task


class Presenter:
    """Makes prediction objects, with the URLs that the settings ask for."""

    def __init__(self, settings: ServerSettings, signer: Signer) -> None:
        self._public_url = settings.public_url
        self._kept_s = settings.retention_hours * 3600
        self._signer = signer

    def __call__(
        self,
        task: Task,
        base_url: str,
        *,
        queue_position: int | None = None,
        waiting_for: str | None = None,
    ) -> dict[str, Any]:
        """The prediction object of ``task``.

        ``base_url`` is how the client called us; a ``--public-url`` goes before it. A
        ``queue_position`` that is known is told, and what it is ``waiting_for`` beside its turn.
        """
        data = prediction(
            task,
            base_url=(self._public_url or base_url).rstrip("/"),
            sign=lambda key, ended: self._signer.path(key, ended + self._kept_s),
        )
        if queue_position is not None:
            data["progress"]["queue_position"] = queue_position
        if waiting_for is not None:
            data["progress"]["waiting_for"] = waiting_for
        return data


def prediction(task: Task, *, base_url: str, sign: Callable[[str, float], str]) -> dict[str, Any]:
    """The ``data`` object that satisfies all known clients at once (wire contract, section 2).

    ``sign`` turns a blob key and the time the task ended into a path; ``base_url`` has no
    trailing slash.
    """
    outcome = task.outcome or Outcome(status=task.status)
    ended = task.finished_at or 0.0
    return {
        "id": task.id,
        "model": task.model,
        "input": public_input(task),
        "outputs": [base_url + sign(key, ended) for key in outcome.outputs],
        "urls": {"get": f"{base_url}/api/v3/predictions/{task.id}/result"},
        "has_nsfw_contents": outcome.has_nsfw_contents,
        "seeds": outcome.seeds,
        "quality": outcome.quality,
        "reused_steps": outcome.reused_steps,
        "status": task.status.value,
        "progress": _progress(task),
        "created_at": timestamp(task.created_at),
        "error": outcome.error,
        "code": outcome.code,
        "executionTime": outcome.timings.get("inference", 0),
        "timings": {"inference": 0, **outcome.timings},
    }


def public_input(task: Task) -> dict[str, Any]:
    """The task's parameters; pictures that were sent inline are left out."""
    shown = dict(task.input)
    for name in ("image", "mask"):
        if _is_inline(shown.get(name, "")):
            del shown[name]
    if "images" in shown:
        shown["images"] = [each for each in shown["images"] if not _is_inline(each)]
    return shown


def _is_inline(picture: str) -> bool:
    return picture.startswith("blob:")


def _progress(task: Task) -> dict[str, int]:
    total = task.input["num_inference_steps"] * task.input["num_images"]
    step = total if task.status is Status.COMPLETED else task.progress_step
    return {"step": step, "total_steps": total}


def timestamp(unix_s: float) -> str:
    """RFC 3339 in UTC with milliseconds and a Z."""
    moment = datetime.fromtimestamp(unix_s, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def envelope(data: Any) -> dict[str, Any]:
    """What every answer with status 200 looks like."""
    return {"code": 200, "message": "success", "data": data}
