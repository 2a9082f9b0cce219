"""How the API process's parts fit together: the one place that knows all of them."""

import time
from functools import partial

from sqlalchemy import Engine

from redux_server.auth import KeyRing
from redux_server.blobs import BlobStore, Signer, signing_secret
from redux_server.coalescer import Coalescer
from redux_server.database_clock import clock_of
from redux_server.engines import build_engine
from redux_server.listing import History
from redux_server.places import Places
from redux_server.presence import Presence
from redux_server.presenting import Presenter
from redux_server.queue_position import QueuePositions
from redux_server.rate_limit import RateLimit
from redux_server.services import Services
from redux_server.settings import ServerSettings
from redux_server.storage import disk_space, open_ballast
from redux_server.store import TaskStore
from redux_server.streams import Streams
from redux_server.sync_mode import SyncMode
from redux_server.uploads import Uploads
from redux_server.webhook_parts import build_webhooks


def assemble(settings: ServerSettings, engine: Engine, blobs: BlobStore) -> Services:
    """The API process's parts over a database and a store of pictures; nothing is started.

    Raises:
        KeyFileError: ``--api-keys-file`` cannot be used.
    """
    clock = clock_of(engine)
    presence = Presence(engine, clock=clock)
    store = TaskStore(
        engine, lease_s=settings.lease_s, max_attempts=settings.max_attempts, clock=clock
    )
    keys = KeyRing(engine, file=settings.api_keys_file)
    signer = Signer(signing_secret(engine), clock=time.time)
    present = Presenter(settings, signer)
    disk = disk_space(settings)
    find = Coalescer(store.get, name="find")

    of_all, of_a_key = settings.max_queue, settings.max_open_per_key
    accept = partial(store.accept, max_open=of_all, max_open_per_key=of_a_key)
    vacancies = partial(store.vacancies, max_open=of_all, max_open_per_key=of_a_key)

    return Services(
        settings=settings,
        store=store,
        accept=Coalescer(accept, name="accept"),
        find=find,
        places=Places(vacancies),
        keys=keys,
        rate=RateLimit(settings.rate_limit),
        presence=presence,
        blobs=blobs,
        signer=signer,
        present=present,
        webhooks=build_webhooks(settings, engine, store, present, clock=clock),
        history=History(engine),
        queue=QueuePositions(engine),
        streams=Streams(store.glance),
        disk=disk,
        ballast=open_ballast(settings),
        uploads=Uploads(settings, blobs=blobs, signer=signer, disk=disk, folder=settings.data_dir),
        sync_mode=SyncMode(find, limit_s=settings.sync_timeout_s),
        engine=build_engine(settings, engine, store, presence),
    )
