"""How a worker stores its images, and what their files say of themselves.

While the store is away or full it tries again, then later. Knows no tasks: the worker says which
bytes go where, and what to do with ``Postponed``.
"""

import threading
from collections.abc import Callable

import structlog

from redux_pipelines.contract.batching import weights_of
from redux_pipelines.contract.types import MAX_POOLING, GenerationRequest, ModelInfo, Quality
from redux_server import __version__
from redux_server.storage.blobs import BlobStore

PROBE_EVERY_S = 5.0
_PAUSES_S = (0.5, 2.0, 5.0)
_log = structlog.get_logger("redux_server.worker.outputs")


class Postponed(Exception):
    """Something is away or full that a task needs. It is as good as it was, but for later.

    ``public`` is what its owner is told if that never ends, as in "``public`` in 20 attempts."
    """

    def __init__(self, reason: str, public: str = "The images could not be stored") -> None:
        super().__init__(reason)
        self.public = public


class RetryingStore:
    """Puts and probes; shared by a worker's lanes.

    After a failure ``wait_until_usable`` holds up whoever would begin new work, whose images would
    have nowhere to go either, until a probe as large as what failed gets through. So it does where
    there was no room for a picture that came in; ``check_room`` raises ``OSError`` while there is
    none.
    """

    def __init__(
        self,
        blobs: BlobStore,
        *,
        worker_id: str,
        stopping: threading.Event,
        check_room: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._blobs = blobs
        self._probe = f"probe/{worker_id.replace('/', '-').replace(':', '-')}"  # a folder
        self._stopping = stopping
        self._check_room = check_room
        self._failed_bytes = 0
        self._wanted_bytes = 0

    def put(self, key: str, data: bytes, *, check_wanted: Callable[[], None]) -> None:
        """Store ``data``; ``check_wanted`` is called before each try and may raise.

        Raises:
            Postponed: it failed every time, or once and we are stopping.
        """
        for pause_s in (*_PAUSES_S, None):
            check_wanted()
            try:
                return self._blobs.put(key, data)
            except OSError as error:
                _log.warning("an image could not be stored", key=key, reason=str(error))
                self.note_failure(len(data))
                if pause_s is None or self._stopping.wait(pause_s):
                    raise Postponed(f"its images could not be stored: {error}") from error

    def delete(self, prefix: str) -> bool:
        """Delete what is under ``prefix``; False if the store does not, or only in part."""
        try:
            self._blobs.delete_under(prefix)
        except OSError as error:
            _log.warning("images could not be deleted", under=prefix, reason=str(error))
            return False
        return True

    def note_failure(self, size_bytes: int) -> None:
        """Remember that the store did not do its work, with so many bytes."""
        self._failed_bytes = max(1, size_bytes)

    def note_no_room(self, size_bytes: int) -> None:
        """Remember that so many bytes that came in could not be kept meanwhile."""
        self._wanted_bytes = size_bytes

    @property
    def has_failed(self) -> bool:
        """Whether the last thing heard of the store was a failure."""
        return bool(self._failed_bytes)

    def wait_until_usable(self) -> None:
        """Return at once unless the last thing heard of the store, or of room, was a failure."""
        while not self._stopping.is_set() and not (self._has_room() and self._try()):
            self._stopping.wait(PROBE_EVERY_S)

    def _has_room(self) -> bool:
        if self._wanted_bytes:
            try:
                self._check_room(self._wanted_bytes)
            except OSError as error:
                _log.warning("there is still no room for pictures", reason=str(error))
                return False
            self._wanted_bytes = 0
        return True

    def _try(self) -> bool:
        if not self._failed_bytes:
            return True
        try:
            self._blobs.put(f"{self._probe}/now", bytes(self._failed_bytes))
            self._blobs.delete_under(self._probe)
        except OSError as error:
            _log.warning("images still cannot be stored", reason=str(error))
            return False
        self._failed_bytes = 0
        return True


def provenance(
    info: ModelInfo, request: GenerationRequest, *, seed: int, quality: Quality
) -> dict[str, str]:
    """What goes into the metadata of an image's file, for ``redux_pipelines.images.files.encode``.

    Of the controls, those that were used. Not the prompt: whoever has the image can read this.
    """
    chunks = {
        "Software": f"FLUX Redux Server {__version__}",
        "Model": f"{info.name} ({info.backend}, {info.dtype})",
        "Seed": str(seed),
        "Steps": str(request.num_inference_steps),
        "Guidance": str(request.guidance_scale),
        "Quality": quality,
    }
    weights = weights_of(request)
    if weights != (1.0,):
        chunks["Picture-Weights"] = ", ".join(f"{weight:g}" for weight in weights)
    if request.redux_pooling < MAX_POOLING:
        chunks["Pooling"] = str(request.redux_pooling)
    if request.fit != "squash":
        chunks["Fit"] = request.fit
    if request.mask is not None:
        chunks["Mask"] = "yes"
    return chunks
