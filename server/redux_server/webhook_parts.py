"""What webhooks need, put together over a database and the settings."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Engine

from redux_server.delivery import Courier
from redux_server.dispatcher import Dispatcher
from redux_server.netguard import AddressPolicy
from redux_server.presenting import Presenter
from redux_server.settings import ServerSettings
from redux_server.store import TaskStore
from redux_server.webhook_url import Callback, check_webhook
from redux_server.webhooks import Outbox, webhook_secret

_HOLD_MARGIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Webhooks:
    """The API process's parts for webhooks."""

    policy: AddressPolicy
    outbox: Outbox
    dispatcher: Dispatcher
    engine: Engine

    def register(self, url: str, base_url: str) -> str:
        """What to note in a task whose end ``url`` is to be told.

        Raises:
            BadRequest: ``url`` would never be called.
        """
        return Callback(check_webhook(url, self.policy), base_url).stored()

    def secret(self, key_id: str) -> str:
        """What signs the webhooks of a key."""
        return webhook_secret(self.engine, key_id)


def build_webhooks(
    settings: ServerSettings,
    engine: Engine,
    store: TaskStore,
    present: Presenter,
    *,
    clock: Callable[[], float] = time.time,
) -> Webhooks:
    """Parts over ``engine``, the database of ``store``, whose ``clock`` tells what is due.

    Nothing is started yet.
    """
    policy = AddressPolicy.from_entries(settings.webhook_allow_entries)
    outbox = Outbox(engine, hold_s=settings.webhook_timeout_s + _HOLD_MARGIN_S, clock=clock)
    courier = Courier(
        policy,
        find=lambda task_id: store.get([task_id])[0],
        render=present,
        secret=partial(webhook_secret, engine),
        scheme=settings.webhook_signature,
        timeout_s=settings.webhook_timeout_s,
    )
    return Webhooks(policy, outbox, Dispatcher(outbox, courier.deliver), engine)
