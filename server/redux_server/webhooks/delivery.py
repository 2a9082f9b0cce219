"""One try to deliver a webhook: the message, its signature, one POST. Keeps no state.

A receiver's URL is a caller's choice, so it is called under the same guard as a picture's URL is
fetched: every address checked, the checked one connected to, the certificate that of the name.
Redirects are not followed, and of the answer only its head is read. Knows neither when a try is due
nor what is written down of it.
"""

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Engine, insert, select
from sqlalchemy.exc import IntegrityError

from redux_server import __version__
from redux_server.database import tables
from redux_server.database.connection import reader
from redux_server.net.client import (
    Clock,
    Connector,
    Deadline,
    GuardedClient,
    Resolver,
    connect,
    resolve,
)
from redux_server.net.guard import AddressPolicy, FetchError, parse_url, quoted
from redux_server.tasks.task import Task
from redux_server.webhooks.outbox import Delivery

CONNECT_TIMEOUT_S = 10.0
SECRET_PREFIX = "whsec_"
SCHEMES = ("wavespeed", "standard", "both")
_KEY_BYTES = 32
_SECRET_NAME_LENGTH = 64  # of secrets.name
_MAX_HEAD_BYTES = 2**18
_USER_AGENT = f"flux-redux-server/{__version__}"


class TaskGone(Exception):
    """The task was deleted before its webhook was delivered."""


class WebhookPoster:
    """Delivers webhooks. Safe to share among threads.

    Args:
        policy: whom to call.
        find: a task by its id, or None.
        render: the message about a task, given the base of its URLs.
        secret: what signs for the id of a key.
        scheme: one of ``SCHEMES``.
        timeout_s: seconds for a whole try; ``CONNECT_TIMEOUT_S`` at most for each address.
        resolver: finds addresses of a name.
        connector: opens a stream to an address.
        clock: gives Unix seconds, for the timestamp.
        monotonic: measures ``timeout_s``.
    """

    def __init__(
        self,
        policy: AddressPolicy,
        *,
        find: Callable[[str], Task | None],
        render: Callable[[Task, str], Mapping[str, Any]],
        secret: Callable[[str], str],
        scheme: str,
        timeout_s: float,
        resolver: Resolver = resolve,
        connector: Connector = connect,
        clock: Clock = time.time,
        monotonic: Clock = time.monotonic,
    ) -> None:
        self._find = find
        self._render = render
        self._secret = secret
        self._scheme = scheme
        self._timeout_s = timeout_s
        self._clock = clock
        self._monotonic = monotonic
        self._client = GuardedClient(
            policy,
            resolver=resolver,
            connector=lambda address, port, limit_s: connector(
                address, port, min(limit_s, CONNECT_TIMEOUT_S)
            ),
        )

    def deliver(self, delivery: Delivery) -> None:
        """Make one try; returning is success.

        Raises:
            FetchError: the receiver was not reached, or did not answer with a status of 2xx.
            TaskGone: there is nothing to tell any more.
        """
        task = self._find(delivery.task_id)
        if task is None:
            raise TaskGone
        message = self._render(task, delivery.callback.base_url)
        body = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode()
        headers = {
            "User-Agent": _USER_AGENT,
            "Accept": "*/*",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **signed_headers(
                self._scheme,
                self._secret(delivery.key_id),
                message_id=delivery.task_id,
                timestamp=int(self._clock()),
                body=body,
            ),
        }
        self._post(delivery.callback.url, headers, body)

    def _post(self, url: str, headers: Mapping[str, str], body: bytes) -> None:
        target = parse_url(url)
        deadline = Deadline(self._timeout_s, self._monotonic)
        try:
            with self._client.request(
                "POST",
                target,
                headers=headers,
                content=body,
                deadline=deadline,
                max_wire_bytes=_MAX_HEAD_BYTES,
            ) as answer:
                status = answer.status
        except FetchError as error:
            said = {  # where the guard speaks of pictures
                "timeout": f"gave no answer in {self._timeout_s:g} s.",
                "too_large": f"began no answer within {_MAX_HEAD_BYTES >> 10} KiB.",
            }.get(error.reason)
            if said is None:
                raise
            raise FetchError(error.reason, f"The host {quoted(target.host)} {said}") from error
        if not 200 <= status < 300:
            raise FetchError(
                "redirect" if 300 <= status < 400 else "status",
                f"The host {quoted(target.host)} answered with status {status}.",
            )


# --- Signatures -----------------------------------------------------------------------------------


def new_secret() -> str:
    """A secret that serves both schemes: ``whsec_`` and 32 random bytes in base64."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_KEY_BYTES)).decode()


def signed_headers(
    scheme: str, secret: str, *, message_id: str, timestamp: int, body: bytes
) -> dict[str, str]:
    """The headers ``webhook-id``, ``webhook-timestamp`` and ``webhook-signature``.

    Both schemes sign ``{id}.{timestamp}.{body}`` with HMAC-SHA-256 and a secret that is written
    ``whsec_...``; they differ in how the secret becomes a key and in how the result is written:

    * WaveSpeed v3: the key is the text after ``whsec_`` as it stands; ``v3,`` and hexadecimal.
    * Standard Webhooks v1 (https://www.standardwebhooks.com): the key is what that text means in
      base64; ``v1,`` and base64.

    ``scheme`` is one of ``SCHEMES``, ``timestamp`` in Unix seconds. ``both`` gives a list as
    Standard Webhooks defines it, separated by a space, the v1 signature first.
    """
    message = f"{message_id}.{timestamp}.".encode() + body
    signatures = []
    if scheme in ("standard", "both"):
        signatures.append(_standard(secret, message))
    if scheme in ("wavespeed", "both"):
        signatures.append(_wavespeed(secret, message))
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signatures),
    }


def _wavespeed(secret: str, message: bytes) -> str:
    key = secret.removeprefix(SECRET_PREFIX).encode()
    return "v3," + hmac.new(key, message, hashlib.sha256).hexdigest()


def _standard(secret: str, message: bytes) -> str:
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    return "v1," + base64.b64encode(hmac.new(key, message, hashlib.sha256).digest()).decode()


def webhook_secret(database: Engine, key_id: str) -> str:
    """The secret that signs the webhooks of an API key: made when it is first asked for."""
    name = f"webhook:{key_id}"
    if len(name) > _SECRET_NAME_LENGTH:  # a long name in the keys file
        name = "webhook:" + hashlib.sha256(key_id.encode()).hexdigest()[:56]
    found = select(tables.secrets.c.value).where(tables.secrets.c.name == name)
    with reader(database).connect() as db:
        value = db.scalar(found)
    if value is not None:
        return str(value)
    try:
        with database.begin() as db:
            value = new_secret()
            db.execute(insert(tables.secrets), {"name": name, "value": value})
    except IntegrityError:  # another node was first
        return webhook_secret(database, key_id)
    return value
