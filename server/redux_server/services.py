"""Everything a route needs, built once by ``serve`` and handed to the app."""

from dataclasses import dataclass, field
from typing import Protocol

from redux_server.auth import KeyRing
from redux_server.blobs import BlobStore, Signer
from redux_server.coalescer import Coalescer
from redux_server.disk import Ballast, DiskSpace
from redux_server.draining import Draining
from redux_server.listing import History
from redux_server.places import Places
from redux_server.presence import Presence
from redux_server.presenting import Presenter
from redux_server.queue_position import QueuePositions
from redux_server.rate_limit import RateLimit
from redux_server.settings import ServerSettings
from redux_server.store import TaskStore
from redux_server.streams import Streams
from redux_server.sync_mode import SyncMode
from redux_server.tasks import Acceptance, NewTask, Task
from redux_server.uploads import Uploads
from redux_server.webhook_parts import Webhooks


class Engine(Protocol):
    """What gets accepted tasks to workers."""

    async def start(self) -> None:
        """Start the workers, if they are ours."""
        ...

    async def stop(self) -> None:
        """Let the workers finish what they hold, then end them; may be called again."""
        ...

    def wake(self) -> None:
        """Say that there is work; may be called often and never blocks."""
        ...


@dataclass(frozen=True, slots=True)
class Services:
    """The API process's parts. ``accept`` and ``find`` are the store's, batched."""

    settings: ServerSettings
    store: TaskStore
    accept: Coalescer[NewTask, Acceptance]
    find: Coalescer[str, Task | None]
    places: Places
    keys: KeyRing
    rate: RateLimit
    presence: Presence
    blobs: BlobStore
    signer: Signer
    present: Presenter
    webhooks: Webhooks
    history: History
    queue: QueuePositions
    streams: Streams
    disk: DiskSpace
    ballast: Ballast
    uploads: Uploads
    sync_mode: SyncMode
    engine: Engine
    draining: Draining = field(default_factory=Draining)
