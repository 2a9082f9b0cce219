"""Everything a route needs, built once by ``serve`` and handed to the app.

The one module that knows how the API process's services fit together. Starts nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from sqlalchemy import Engine

from redux_server.api.auth import KeyRing
from redux_server.api.bodies import Bodies
from redux_server.api.coalescer import Coalescer
from redux_server.api.fleet import FleetWatch
from redux_server.api.following import (
    MAX_HELD,
    MAX_HELD_OF_A_KEY,
    MAX_STREAMS,
    MAX_STREAMS_OF_A_KEY,
    Subscriptions,
    SyncMode,
    TaskPoller,
)
from redux_server.api.http_server import Draining
from redux_server.api.limits import QueueReservations, RateLimit, StorageShare
from redux_server.api.prediction import Presenter
from redux_server.api.rejoining import Rejoining
from redux_server.database.clock import ClockGuard, clock_of
from redux_server.dispatch.choice import Dispatch, build_dispatch
from redux_server.dispatch.presence import Presence
from redux_server.metrics import WorkerReports
from redux_server.pictures.upload_records import UploadRecords
from redux_server.pictures.uploads import Uploads
from redux_server.settings import ServerSettings
from redux_server.storage.blobs import BlobStore
from redux_server.storage.disk import Ballast, DiskSpace
from redux_server.storage.opening import disk_space, open_ballast
from redux_server.storage.owner import StoreOwner, database_id
from redux_server.storage.signing import Signer, signing_secret
from redux_server.storage.threads import StorageThreads
from redux_server.tasks.accepting import Bounds, IdempotencyKeys, free_places
from redux_server.tasks.listing import History
from redux_server.tasks.previews import Previews
from redux_server.tasks.queue_position import QueuePositions
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import Acceptance, NewTask, Task
from redux_server.webhooks.service import Webhooks, build_webhooks


@dataclass(frozen=True, slots=True)
class Services:
    """What the API process works with. ``accept`` and ``find`` are the store's, batched."""

    settings: ServerSettings
    store: TaskStore
    accept: Coalescer[NewTask, Acceptance]
    find: Coalescer[str, Task | None]
    reservations: QueueReservations
    idempotency: IdempotencyKeys
    keys: KeyRing
    rate: RateLimit
    upload_rate: RateLimit
    clock: Callable[[], float]
    clock_guard: ClockGuard
    presence: Presence
    fleet: FleetWatch
    blobs: BlobStore
    storage_threads: StorageThreads
    store_owner: StoreOwner
    signer: Signer
    present: Presenter
    webhooks: Webhooks
    history: History
    queue: QueuePositions
    previews: Previews
    poller: TaskPoller
    streams: Subscriptions
    sync_mode: SyncMode
    rejoining: Rejoining
    disk: DiskSpace
    ballast: Ballast
    uploads: Uploads
    bodies: Bodies
    worker_reports: WorkerReports
    dispatch: Dispatch
    draining: Draining = field(default_factory=Draining)


def assemble(settings: ServerSettings, database: Engine, blobs: BlobStore) -> Services:
    """The services over a database and a store of pictures; nothing is started.

    Raises:
        KeyFileError: ``--api-keys-file`` cannot be used.
    """
    clock = clock_of(database)
    store = _store(settings, database, clock)
    keys = KeyRing(database, file=settings.api_keys_file, clock=clock)
    signer = Signer(signing_secret(database), clock=clock)
    storage_threads, worker_reports = StorageThreads(), WorkerReports()
    present, disk = Presenter(settings, signer), disk_space(settings)
    find = Coalescer(store.get, name="find")
    poller = TaskPoller(store.glance, revoked_of=keys.revoked_of)
    held_requests = Subscriptions(poller, most=MAX_HELD, most_of_a_key=MAX_HELD_OF_A_KEY)
    bounds = _bounds(settings, disk)
    idempotency, presence = IdempotencyKeys(database, clock=clock), Presence(database, clock=clock)
    return Services(
        settings=settings,
        store=store,
        accept=_accept(store, bounds),
        find=find,
        reservations=QueueReservations(partial(free_places, database, bounds=bounds)),
        idempotency=idempotency,
        keys=keys,
        rate=RateLimit(settings.rate_limit),
        upload_rate=RateLimit(settings.rate_limit),
        clock=clock,
        clock_guard=ClockGuard(database, clock=clock),
        presence=presence,
        fleet=FleetWatch(presence),
        blobs=blobs,
        storage_threads=storage_threads,
        store_owner=_owner(settings, database, blobs, store),
        signer=signer,
        present=present,
        webhooks=build_webhooks(settings, database, store, present, clock=clock),
        history=History(database),
        queue=QueuePositions(database),
        previews=Previews(database, clock=clock),
        poller=poller,
        streams=Subscriptions(poller, most=MAX_STREAMS, most_of_a_key=MAX_STREAMS_OF_A_KEY),
        rejoining=Rejoining(idempotency),
        sync_mode=SyncMode(held_requests, find, limit_s=settings.sync_timeout_s),
        disk=disk,
        ballast=open_ballast(settings),
        uploads=Uploads(
            settings,
            blobs=blobs,
            threads=storage_threads,
            signer=signer,
            disk=disk,
            folder=settings.temporary_dir,
            records=UploadRecords(database, clock=clock),
            clock=clock,
        ),
        bodies=Bodies(settings.temporary_dir, disk),
        worker_reports=worker_reports,
        dispatch=build_dispatch(settings, database, store, presence, worker_reports),
    )


def _store(settings: ServerSettings, database: Engine, clock: Callable[[], float]) -> TaskStore:
    return TaskStore(
        database, lease_s=settings.lease_s, max_attempts=settings.max_attempts, clock=clock
    )


def _bounds(settings: ServerSettings, disk: DiskSpace) -> Bounds:
    left_bytes = StorageShare(settings, disk).left
    return Bounds(settings.max_queue, settings.max_open_per_key, settings.queue_share, left_bytes)


def _accept(store: TaskStore, bounds: Bounds) -> Coalescer[NewTask, Acceptance]:
    accept = partial(
        store.accept,
        max_open=bounds.of_all,
        max_open_per_key=bounds.of_a_key,
        share=bounds.share,
        left_bytes=bounds.left_bytes,
    )
    return Coalescer(accept, name="accept")


def _owner(
    settings: ServerSettings, database: Engine, blobs: BlobStore, store: TaskStore
) -> StoreOwner:
    return StoreOwner(
        blobs,
        database_id(database),
        knows_any=lambda ids: any(store.get(ids)),
        where=settings.blob_url or str(settings.blobs_dir),
    )
