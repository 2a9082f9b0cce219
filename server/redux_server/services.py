"""Everything a route needs, built once by ``serve`` and handed to the app."""

from dataclasses import dataclass
from typing import Protocol

from redux_server.auth import KeyRing
from redux_server.blobs import Blobs, Signer
from redux_server.coalescer import Coalescer
from redux_server.presence import Presence
from redux_server.settings import ServerSettings
from redux_server.store import TaskStore
from redux_server.tasks import NewTask, Task


class Engine(Protocol):
    """What gets accepted tasks to workers."""

    async def start(self) -> None:
        """Start the workers, if they are ours."""
        ...

    async def stop(self) -> None:
        """Let the workers finish what they hold, then end them."""
        ...

    def wake(self) -> None:
        """Say that there is work; may be called often and never blocks."""
        ...


@dataclass(frozen=True, slots=True)
class Services:
    """The API process's parts. ``accept`` and ``find`` are the store's, batched."""

    settings: ServerSettings
    store: TaskStore
    accept: Coalescer[NewTask, Task | None]
    find: Coalescer[str, Task | None]
    keys: KeyRing
    presence: Presence
    blobs: Blobs
    signer: Signer
    engine: Engine
