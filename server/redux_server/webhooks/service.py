"""All that an API process needs for webhooks, built over a database from the settings."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Engine

from redux_server.net.guard import AddressPolicy
from redux_server.settings import ServerSettings
from redux_server.tasks.store import TaskStore
from redux_server.tasks.task import Task
from redux_server.webhooks.callback import Callback, check_webhook
from redux_server.webhooks.delivery import WebhookPoster, webhook_secret
from redux_server.webhooks.outbox import Outbox
from redux_server.webhooks.sender import WebhookSender

_HOLD_MARGIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Webhooks:
    """The webhooks of an API process. ``database`` is the database that holds their secrets."""

    policy: AddressPolicy
    outbox: Outbox
    sender: WebhookSender
    database: Engine

    def register(self, url: str, base_url: str) -> str:
        """What to note in a task whose end ``url`` is to be told.

        Raises:
            BadRequest: ``url`` would never be called.
        """
        return Callback(check_webhook(url, self.policy), base_url).stored()

    def secret(self, key_id: str) -> str:
        """What signs the webhooks of a key."""
        return webhook_secret(self.database, key_id)


def build_webhooks(
    settings: ServerSettings,
    database: Engine,
    store: TaskStore,
    render: Callable[[Task, str], Mapping[str, Any]],
    *,
    clock: Callable[[], float] = time.time,
) -> Webhooks:
    """Webhooks over ``database``, the database of ``store``, whose ``clock`` tells what is due.

    ``render`` makes the message about a task, given the base of its URLs. Nothing is started yet.
    """
    policy = AddressPolicy.from_entries(settings.webhook_allow_entries)
    outbox = Outbox(database, hold_s=settings.webhook_timeout_s + _HOLD_MARGIN_S, clock=clock)
    poster = WebhookPoster(
        policy,
        find=lambda task_id: store.get([task_id])[0],
        render=render,
        secret=partial(webhook_secret, database),
        scheme=settings.webhook_signature,
        timeout_s=settings.webhook_timeout_s,
    )
    return Webhooks(policy, outbox, WebhookSender(outbox, poster.deliver), database)
