"""Tickets: messages that say "there is work", carried by Celery. Knows no tasks and no worker.

A ticket holds nothing but how often it was passed on. Losing one costs time, a second one a look
at the database; so nothing here needs to be more careful than a broker is by default, and what a
broker offers is used to lose few: quorum queues, late acknowledgement, publisher confirms.
"""

import hashlib
from typing import Any

from celery import Celery
from kombu import Exchange, Queue

TICKET = "flux_redux.ticket"
_CONNECT_S = 4.0
_REDIS = {
    # How long Redis waits before it hands out again what a dead worker had: kombu's defaults make
    # that a minute and a half.
    "visibility_timeout": 60,
    "unacked_restore_interval": 3,
    "unacked_restore_throttle": 1,
    "socket_connect_timeout": _CONNECT_S,
    "socket_timeout": 30.0,
}
_AMQP = {"confirm_publish": True, "confirm_timeout": _CONNECT_S}


def queue_name(secret: bytes) -> str:
    """The queue of all who share ``secret``, so that two servers can share a broker."""
    digest = hashlib.sha256(b"tickets/" + secret).hexdigest()
    return f"flux-redux-tickets-{digest[:12]}"


def ticket_app(broker_url: str, queue: str) -> Celery:
    """Celery, set up to carry tickets in ``queue`` and nothing else."""
    app = Celery("flux-redux", broker=broker_url, set_as_current=False)
    is_amqp = broker_url.startswith("amqp")
    arguments: dict[str, Any] = {}
    if is_amqp:
        # Beyond that many, the oldest are dropped: no fleet of workers needs more to be woken.
        arguments = {"x-queue-type": "quorum", "x-max-length": 10_000}
    options = _AMQP if is_amqp else _REDIS if broker_url.startswith("redis") else {}
    app.conf.update(
        task_queues=[Queue(queue, Exchange(""), routing_key=queue, queue_arguments=arguments)],
        task_default_queue=queue,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_timeout=_CONNECT_S,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_heartbeat=10,
        broker_transport_options=options,
    )
    return app


def send_ticket(app: Celery, *, passed_on: int = 0) -> None:
    """Publish one; raises what kombu raises after a few quick tries."""
    app.send_task(
        TICKET,
        args=(passed_on,),
        queue=app.conf.task_default_queue,
        retry=True,
        retry_policy={"max_retries": 2, "interval_start": 0.1, "interval_step": 0.2},
    )


def waiting_tickets(app: Celery) -> int:
    """How many lie in the queue, which is made if there is none."""
    [queue] = app.conf.task_queues
    with app.connection_for_write() as connection, connection.channel() as channel:
        return int(queue(channel).queue_declare().message_count)
