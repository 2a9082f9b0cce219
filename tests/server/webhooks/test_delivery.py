"""One try to deliver a webhook: what is sent, and what receivers may do to us."""

import base64
import itertools
import json
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpcore
import pytest
from sqlalchemy import Engine, select
from standardwebhooks import Webhook, WebhookVerificationError

from redux_server.database.tables import secrets as secrets_table
from redux_server.net.guard import AddressPolicy, FetchError
from redux_server.tasks.task import Status, Task
from redux_server.webhooks.callback import Callback
from redux_server.webhooks.delivery import (
    CONNECT_TIMEOUT_S,
    TaskGone,
    WebhookPoster,
    new_secret,
    signed_headers,
    webhook_secret,
)
from redux_server.webhooks.outbox import Delivery
from server.receiver import Received, is_signed, listening, receiving

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
LOOPBACK = AddressPolicy.from_entries(["127.0.0.1:*"])
TASK = Task(
    id="45b392b22c3b449fa935bd4dc2219dfe",
    key_id="k",
    model="m",
    status=Status.COMPLETED,
    input={},
    request_id="r",
    created_at=0.0,
    started_at=None,
    finished_at=1.0,
    attempt=1,
    crashes=0,
    progress_step=0,
    outcome=None,
)


def poster(policy: AddressPolicy = LOOPBACK, **options: Any) -> WebhookPoster:
    given: dict[str, Any] = {
        "find": {TASK.id: TASK}.get,
        "render": lambda task, base: {"id": task.id, "prompt": "früh", "base": base},
        "secret": {"k": SECRET}.__getitem__,
        "scheme": "wavespeed",
        "timeout_s": 30.0,
    }
    return WebhookPoster(policy, **(given | options))


def delivery(url: str, task_id: str = TASK.id) -> Delivery:
    return Delivery(task_id, "k", Callback(url, "https://flux.example/"), tries=1)


def refusal(poster: WebhookPoster, url: str) -> FetchError:
    with pytest.raises(FetchError) as caught:
        poster.deliver(delivery(url))
    assert "s3cret" not in caught.value.public_message
    return caught.value


# --- on loopback ----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_signed_prediction_is_posted_and_any_2xx_is_success(status: int) -> None:
    calls: list[Received] = []

    def answer(call: Received) -> int:
        calls.append(call)
        return status

    with receiving(answer) as port:
        poster().deliver(delivery(f"http://127.0.0.1:{port}/hook?token=s3cret"))
    (call,) = calls
    assert call.path == "/hook?token=s3cret"
    assert call.headers["host"] == f"127.0.0.1:{port}"
    assert call.headers["content-type"] == "application/json"
    assert call.headers["user-agent"].startswith("flux-redux-server/")
    assert not {"authorization", "cookie"} & set(call.headers)
    assert call.id == TASK.id
    assert abs(int(call.headers["webhook-timestamp"]) - time.time()) < 60
    assert is_signed(call, SECRET)
    assert json.loads(call.body) == {
        "id": TASK.id,
        "prompt": "früh",
        "base": "https://flux.example/",
    }


@pytest.mark.parametrize(
    ("status", "reason"),
    [(302, "redirect"), (304, "redirect"), (400, "status"), (410, "status"), (503, "status")],
)
def test_other_answers_are_failures(status: int, reason: str) -> None:
    with receiving(lambda _: status) as port:
        error = refusal(poster(), f"http://127.0.0.1:{port}/?s3cret")
    assert error.reason == reason and f"status {status}" in error.public_message


def test_redirects_are_not_followed() -> None:
    visits: list[str] = []

    def canary(_conversation: socket.socket) -> None:
        visits.append("canary")

    with listening(canary) as inner:

        def redirect(conversation: socket.socket) -> None:
            conversation.recv(65536)
            visits.append("door")
            place = f"http://127.0.0.1:{inner}/"
            head = f"HTTP/1.1 307 Moved\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n"
            conversation.sendall(head.encode())

        with listening(redirect) as port:
            assert refusal(poster(), f"http://127.0.0.1:{port}/").reason == "redirect"
    assert visits == ["door"]


def test_receiver_that_hangs_is_left_at_the_deadline() -> None:
    release = threading.Event()
    with listening(lambda _: release.wait(60) and None) as port:
        started = time.monotonic()
        error = refusal(poster(timeout_s=0.5), f"http://127.0.0.1:{port}/")
        assert 0.4 < time.monotonic() - started < 20
        release.set()
    assert error.reason == "timeout" and "0.5 s" in error.public_message


def test_answer_that_drips_is_left_at_the_deadline() -> None:
    def drip(conversation: socket.socket) -> None:
        conversation.sendall(b"HTTP/1.1 200 OK\r\n")
        for _ in range(600):
            conversation.sendall(b"X: y\r\n")
            time.sleep(0.05)

    with listening(drip) as port:
        started = time.monotonic()
        assert refusal(poster(timeout_s=0.5), f"http://127.0.0.1:{port}/").reason == "timeout"
        assert time.monotonic() - started < 20


def test_long_answer_is_not_read() -> None:
    sent = 0

    def talk(conversation: socket.socket) -> None:
        nonlocal sent
        conversation.recv(65536)
        conversation.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        for _ in range(100):
            conversation.sendall(bytes(2**20))
            sent += 2**20

    with listening(talk) as port:
        poster().deliver(delivery(f"http://127.0.0.1:{port}/"))
    assert sent < 50 * 2**20


def test_endless_head_is_refused() -> None:
    def talk(conversation: socket.socket) -> None:
        conversation.recv(65536)
        while True:
            conversation.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)

    with listening(talk) as port:
        assert refusal(poster(), f"http://127.0.0.1:{port}/").reason == "too_large"


@pytest.mark.parametrize(
    "reply", [b"", b"HTTP/1.1 200", b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 999999 x\r\n\r\n"]
)
def test_receiver_that_closes_early_or_talks_nonsense_is_a_failure(reply: bytes) -> None:
    def talk(conversation: socket.socket) -> None:
        conversation.recv(65536)
        conversation.sendall(reply)

    with listening(talk) as port:
        assert refusal(poster(), f"http://127.0.0.1:{port}/").reason == "connect"


def test_closed_port_is_a_failure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert refusal(poster(), f"http://127.0.0.1:{port}/").reason == "connect"


def test_loopback_is_not_called_unless_allowed() -> None:
    visits: list[socket.socket] = []
    with listening(visits.append) as port:
        for host in ("127.0.0.1", "localhost", "[::1]"):
            error = refusal(poster(AddressPolicy()), f"http://{host}:{port}/")
            assert error.reason == "address"
    assert visits == []


# --- with a recorded network ----------------------------------------------------------------------


class Wire(httpcore.NetworkStream):
    """Records a conversation and answers 200."""

    def __init__(self) -> None:
        self.tls: list[str | None] = []
        self.left = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data, self.left = self.left[:max_bytes], self.left[max_bytes:]
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        pass

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        assert ssl_context.check_hostname
        self.tls.append(server_hostname)
        return self

    def close(self) -> None:
        pass


class Network:
    """Resolves by a list, one answer a call, and connects nowhere."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = itertools.cycle(answers)
        self.connected: list[tuple[str, int, float]] = []
        self.wire = Wire()

    def resolve(self, host: str, port: int) -> Sequence[str]:
        return next(self.answers)

    def connect(self, address: str, port: int, timeout_s: float) -> httpcore.NetworkStream:
        self.connected.append((address, port, timeout_s))
        self.wire.left = Wire().left
        return self.wire

    def poster(self, policy: AddressPolicy | None = None) -> WebhookPoster:
        return poster(policy or AddressPolicy(), resolver=self.resolve, connector=self.connect)


def test_checked_address_is_called_under_the_name_of_the_url() -> None:
    network = Network(["93.184.216.34"])
    network.poster().deliver(delivery("https://hooks.example/x"))
    ((address, port, limit_s),) = network.connected
    assert (address, port) == ("93.184.216.34", 443)
    assert limit_s <= CONNECT_TIMEOUT_S
    assert network.wire.tls == ["hooks.example"]


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["93.184.216.34", "10.0.0.1"],
        ["169.254.169.254"],
        ["100.64.0.1"],
        ["::1"],
        ["::ffff:10.0.0.1"],
        ["64:ff9b::a9fe:a9fe"],
        ["fd00::1"],
    ],
)
def test_name_with_a_private_address_is_never_connected_to(addresses: list[str]) -> None:
    network = Network(addresses)
    assert refusal(network.poster(), "https://rebind.example/?s3cret").reason == "address"
    assert network.connected == []


def test_name_that_turns_private_between_tries_is_refused() -> None:
    network = Network(["93.184.216.34"], ["127.0.0.1"])
    poster = network.poster()
    poster.deliver(delivery("https://rebind.example/"))
    assert refusal(poster, "https://rebind.example/").reason == "address"
    assert len(network.connected) == 1


def test_name_that_the_operator_allows_may_be_private() -> None:
    network = Network(["10.0.0.7"])
    network.poster(AddressPolicy.from_entries(["hooks.lan:9000"])).deliver(
        delivery("http://hooks.lan:9000/")
    )
    assert network.connected[0][:2] == ("10.0.0.7", 9000)


def test_deleted_task_is_not_told_of() -> None:
    network = Network(["93.184.216.34"])
    with pytest.raises(TaskGone):
        network.poster().deliver(delivery("https://hooks.example/", task_id="gone"))
    assert network.connected == []


# --- signatures -----------------------------------------------------------------------------------


BODY = json.dumps({"id": "a1", "prompt": "früh"}, ensure_ascii=False).encode()


def headers(scheme: str, secret: str, body: bytes = BODY) -> dict[str, str]:
    now = int(time.time())
    return signed_headers(scheme, secret, message_id="a1", timestamp=now, body=body)


def test_hosted_scheme_takes_the_secret_as_text() -> None:
    secret = new_secret()
    given = headers("wavespeed", secret)
    assert given["webhook-id"] == "a1"
    assert is_signed(Received("/", given, BODY), secret)
    assert not is_signed(Received("/", given, BODY + b" "), secret)
    assert not is_signed(Received("/", given, BODY), new_secret())


def test_hosted_scheme_by_openssl() -> None:
    """printf 'm1.1700000000.{"a":1}' | openssl dgst -sha256 -hmac c2VjcmV0LXNlY3JldC1zZWNyZXQ="""
    given = signed_headers(
        "wavespeed",
        "whsec_c2VjcmV0LXNlY3JldC1zZWNyZXQ=",
        message_id="m1",
        timestamp=1_700_000_000,
        body=b'{"a":1}',
    )
    assert given == {
        "webhook-id": "m1",
        "webhook-timestamp": "1700000000",
        "webhook-signature": "v3,6d7929fa13624a46da9d8804ad1ad05259706aaa98fce6e8b80cafb08668ee03",
    }


@pytest.mark.parametrize("scheme", ["standard", "both"])
def test_library_of_standard_webhooks_accepts(scheme: str) -> None:
    secret = new_secret()
    given = headers(scheme, secret)
    assert Webhook(secret).verify(BODY, given) == json.loads(BODY)
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(BODY.replace(b"a1", b"a2"), given)
    with pytest.raises(WebhookVerificationError):
        Webhook(new_secret()).verify(BODY, given)


def test_both_schemes_stand_in_one_list() -> None:
    secret = new_secret()
    given = headers("both", secret)
    first, second = given["webhook-signature"].split(" ")
    assert first.startswith("v1,") and second.startswith("v3,")
    assert is_signed(Received("/", {**given, "webhook-signature": second}, BODY), secret)


def test_secrets_are_random_and_hold_256_bits() -> None:
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    for secret in secrets:
        prefix, text = secret[:6], secret[6:]
        assert prefix == "whsec_" and len(base64.b64decode(text, validate=True)) == 32


# --- secrets --------------------------------------------------------------------------------------


def test_each_key_has_one_secret_for_good(either_database: Engine) -> None:
    first = webhook_secret(either_database, "a")
    assert webhook_secret(either_database, "a") == first != webhook_secret(either_database, "b")
    with either_database.connect() as db:
        assert set(db.scalars(select(secrets_table.c.name))) == {"webhook:a", "webhook:b"}


def test_long_key_ids_have_secrets_of_their_own(either_database: Engine) -> None:
    long = "file:" + "x" * 59
    assert webhook_secret(either_database, long) == webhook_secret(either_database, long)
    assert webhook_secret(either_database, long) != webhook_secret(either_database, long[:-1])
