"""Delivers what is in the outbox of a database until it is killed: python send_webhooks.py URL."""

import sys
import threading
import time
from functools import partial

from redux_server.api.prediction import Presenter
from redux_server.database.migration import open_database
from redux_server.net.guard import AddressPolicy
from redux_server.settings import ServerSettings
from redux_server.storage.signing import Signer
from redux_server.tasks.store import TaskStore
from redux_server.webhooks.delivery import WebhookPoster, webhook_secret
from redux_server.webhooks.outbox import Outbox
from redux_server.webhooks.sender import WebhookSender


def main(database_url: str) -> None:
    engine = open_database(database_url)
    store = TaskStore(engine)
    poster = WebhookPoster(
        AddressPolicy.from_entries(["127.0.0.1:*"]),
        find=lambda task_id: store.get([task_id])[0],
        render=Presenter(ServerSettings(), Signer(b"secret", clock=time.time)),
        secret=partial(webhook_secret, engine),
        scheme="wavespeed",
        timeout_s=20.0,
    )
    outbox = Outbox(engine, hold_s=25.0)
    # Pauses a thousand times shorter than the real ones, and no end of tries.
    WebhookSender(outbox, poster.deliver, pause_s=lambda _: 0.01, poll_s=0.05).start()
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1])
