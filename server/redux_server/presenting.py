"""A task as its owner sees it: with absolute URLs, signed for as long as its images are kept."""

from typing import Any

from redux_server.blobs import Signer
from redux_server.schemas import prediction
from redux_server.settings import ServerSettings
from redux_server.tasks import Task


class Presenter:
    """Makes prediction objects, the same for an answer, a poll and a webhook."""

    def __init__(self, settings: ServerSettings, signer: Signer) -> None:
        self._public_url = settings.public_url
        self._kept_s = settings.retention_hours * 3600
        self._signer = signer

    def __call__(
        self, task: Task, base_url: str, *, queue_position: int | None = None
    ) -> dict[str, Any]:
        """The prediction object of ``task``.

        ``base_url`` is how the client called us; a ``--public-url`` goes before it. A
        ``queue_position`` that is known is told.
        """
        data = prediction(
            task,
            base_url=(self._public_url or base_url).rstrip("/"),
            sign=lambda key, ended: self._signer.path(key, ended + self._kept_s),
        )
        if queue_position is not None:
            data["progress"]["queue_position"] = queue_position
        return data
