"""Keys: how they are stored, recognised, revoked; and what the middleware lets through."""

import asyncio
import hashlib
import json
import random
import string
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from redux_server.api import auth
from redux_server.api.auth import KEY_PREFIX, AuthMiddleware, KeyFileError, KeyRing, read_keys_file
from redux_server.errors import Unauthorized
from server.in_process import Clock

FILE_KEY = "a-key-of-sixteen"


@pytest.fixture
def ring(database: Engine, clock: Clock) -> KeyRing:
    return KeyRing(database, clock=clock)


def stored_bytes(database: Engine) -> bytes:
    database.dispose()
    folder = Path(str(database.url.database)).parent
    return b"".join(path.read_bytes() for path in folder.glob("tasks.db*"))


def test_only_the_digest_is_stored(database: Engine, ring: KeyRing) -> None:
    key = ring.create("me")
    written = stored_bytes(database)
    assert hashlib.sha256(key.encode()).hexdigest().encode() in written
    assert key.encode() not in written
    assert key.removeprefix(KEY_PREFIX).encode() not in written


def test_keys_are_long_random_and_all_different(ring: KeyRing) -> None:
    keys = [ring.create("me") for _ in range(20)]
    assert len(set(keys)) == 20
    assert all(key.startswith("frs_") and len(key) >= 36 for key in keys)


def test_key_is_recognised_as_its_owner(ring: KeyRing) -> None:
    mine, yours = ring.create("me"), ring.create("you")
    ids = {key.name: key.id for key in ring.list()}
    assert ring.recognise(mine) == ids["me"]
    assert ring.recognise(yours) == ids["you"]
    assert ids["me"] != ids["you"]


@pytest.mark.parametrize(
    "change", [str.upper, str.strip, lambda key: key[:-1], lambda key: key + "x"]
)
def test_nearly_the_key_is_not_the_key(ring: KeyRing, change: Callable[[str], str]) -> None:
    key = ring.create("me")
    assert ring.recognise(change(key)) == (ring.recognise(key) if change(key) == key else None)


@pytest.mark.parametrize("key", ["", "x", "'; drop table keys; --", "\udcff", "ü", "x" * 100_000])
def test_strange_keys_are_not_recognised(ring: KeyRing, key: str) -> None:
    assert ring.recognise(key) is None


def test_revoked_key_is_useless_at_once_where_it_was_revoked(ring: KeyRing) -> None:
    key = ring.create("me")
    assert ring.recognise(key) is not None
    assert ring.revoke(ring.list()[0].id)
    assert ring.recognise(key) is None


def test_revoked_key_is_useless_elsewhere_within_two_seconds(
    database: Engine, ring: KeyRing, clock: Clock
) -> None:
    server = KeyRing(database, clock=clock)
    key = ring.create("me")
    assert server.recognise(key) is not None
    ring.revoke(ring.list()[0].id)
    clock.now += 1.9
    assert server.recognise(key) is not None, "cached"
    clock.now += 0.2
    assert server.recognise(key) is None


def test_key_made_elsewhere_is_known_at_once(database: Engine, ring: KeyRing, clock: Clock) -> None:
    server = KeyRing(database, clock=clock)
    key = ring.create("me")
    assert server.recognise(key) is not None


def test_revoking_twice_or_the_unknown_is_told(ring: KeyRing, clock: Clock) -> None:
    ring.create("me")
    (key,) = ring.list()
    assert ring.revoke(key.id)
    revoked_at = ring.list()[0].revoked_at
    clock.now += 60
    assert not ring.revoke(key.id)
    assert not ring.revoke("nobody")
    assert ring.list()[0].revoked_at == revoked_at == clock.now - 60


def test_list_shows_no_secret_and_is_in_order(ring: KeyRing, clock: Clock) -> None:
    secrets = []
    for name in ("first", "second", "third"):
        secrets.append(ring.create(name))
        clock.now += 1
    assert [key.name for key in ring.list()] == ["first", "second", "third"]
    assert not [secret for secret in secrets if secret in repr(ring.list())]


def test_key_has_the_priority_it_was_made_with(ring: KeyRing) -> None:
    ring.create("usual")
    ring.create("urgent", priority=7)
    ring.create("patient", priority=-3)
    assert {key.name: key.priority for key in ring.list()} == {
        "usual": 0,
        "urgent": 7,
        "patient": -3,
    }


def test_ring_is_empty_until_there_is_a_valid_key(ring: KeyRing) -> None:
    assert ring.is_empty()
    ring.create("me")
    assert not ring.is_empty()
    ring.revoke(ring.list()[0].id)
    assert ring.is_empty()


def test_recognising_asks_the_database_once_in_two_seconds(
    database: Engine, ring: KeyRing, clock: Clock
) -> None:
    key = ring.create("me")
    asked = []
    event.listen(database, "begin", asked.append)
    for _ in range(50):
        ring.recognise(key)
        ring.recognise("frs_wrong")
    assert len(asked) == 2
    clock.now += 2.0
    ring.recognise(key)
    assert len(asked) == 3


def test_cache_of_wrong_keys_is_bounded(ring: KeyRing) -> None:
    for number in range(1100):
        ring.recognise(f"frs_{number}")
    assert len(ring._cache) <= 1024


# --- keys of a file -------------------------------------------------------------------------------


def test_keys_of_a_file_are_recognised_by_name(database: Engine, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# team\n\n  me : {FILE_KEY} \nyou:another-key-of-16\n")
    ring = KeyRing(database, file=str(path))
    assert ring.recognise(FILE_KEY) == "file:me"
    assert ring.recognise("another-key-of-16") == "file:you"
    assert ring.recognise("another-key-of-17") is None
    assert not ring.is_empty()


def test_key_of_a_file_may_hold_colons(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("me:a:key:with:colons:in:it\n")
    (owner,) = read_keys_file(path).values()
    assert owner == "file:me"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("no colon here", "line 1"),
        (f"ok:{FILE_KEY}\nme:short", "line 2"),
        (f":{FILE_KEY}", "line 1"),
        ("me:               ", "line 1"),
    ],
)
def test_bad_line_of_a_file_is_named_without_its_key(
    tmp_path: Path, content: str, complaint: str
) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(KeyFileError, match=complaint) as caught:
        read_keys_file(path)
    assert FILE_KEY not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"me:\xff\xfe\xff"])
def test_unreadable_file_is_told(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(KeyFileError, match="cannot read --api-keys-file"):
        read_keys_file(path)


# --- the middleware -------------------------------------------------------------------------------


def _run(call: Coroutine[Any, Any, None]) -> None:
    """Run to the end what never waits: an event loop for each would take most of the time."""
    with pytest.raises(StopIteration):
        call.send(None)


class Door:
    """The middleware before an app that notes who came through."""

    def __init__(self, recognise: Callable[[str], str | None] | None = None) -> None:
        self.passed: list[Any] = []
        known = {"right": "owner-1"}
        self.app = AuthMiddleware(self._inner, recognise=recognise or known.get)

    async def _inner(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.passed.append(scope.get("state", {}).get("key_id"))
        await PlainTextResponse("in")(scope, receive, send)

    def knock(self, path: str, *headers: tuple[bytes, bytes]) -> tuple[int, Any]:
        """Status and body; reading the request's body is a failure."""
        sent: list[Any] = []

        async def receive() -> Any:
            raise AssertionError("the body was read before the key was known")

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers)}
        _run(self.app(scope, receive, send))
        return sent[0]["status"], sent[1]["body"]


@pytest.mark.parametrize("path", ["/api/v3/x", "/api/", "/api/v2/predictions/0/result"])
def test_nothing_under_api_passes_without_a_key(path: str) -> None:
    door = Door()
    status, body = door.knock(path)
    assert status == 401
    assert json.loads(body)["error_code"] == "invalid_api_key"
    assert not door.passed


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/files/a/b/c", "/docs", "/"])
def test_probes_files_and_docs_need_no_key(path: str) -> None:
    door = Door()
    assert door.knock(path)[0] == 200
    assert door.passed == [None]


@pytest.mark.parametrize("scheme", [b"Bearer", b"bearer", b"BEARER"])
def test_right_key_passes_and_its_owner_is_noted(scheme: bytes) -> None:
    door = Door()
    assert door.knock("/api/v3/x", (b"authorization", scheme + b" right"))[0] == 200
    assert door.passed == ["owner-1"]


@pytest.mark.parametrize(
    "header",
    [b"right", b"Basic right", b"Bearer", b"Bearer wrong", b"Bearer right x", b"\xff \xff"],
)
def test_other_authorizations_do_not_pass(header: bytes) -> None:
    door = Door()
    assert door.knock("/api/v3/x", (b"authorization", header))[0] == 401
    assert not door.passed


def wrong_headers(key: str, count: int, seed: int) -> Iterator[bytes]:
    """Values of Authorization that are near to the right one, or far from it; never the same."""
    rng = random.Random(seed)
    right = f"Bearer {key}".encode()
    text = string.ascii_letters + string.digits + "-_"

    def another() -> bytes:
        return ("Bearer frs_" + "".join(rng.choices(text, k=32))).encode()

    def near() -> bytes:
        at, changed = rng.randrange(7, len(right)), bytearray(right)
        changed[at : at + rng.randrange(2)] = rng.choice(text).encode()
        return bytes(changed)

    def mangled() -> bytes:
        ways = (bytes.upper, bytes.swapcase, bytes.lower, lambda b: b[:-1], lambda b: b[8:])
        return bytes(rng.choice(ways)(right)) + rng.choice((b"", b"x", b",", b"\0", b" ", b"=")) * 2

    def digest() -> bytes:
        return b"Bearer " + hashlib.sha256(key.encode()).hexdigest().encode()[: rng.randrange(65)]

    def scheme() -> bytes:
        name = rng.choice((b"Basic", b"Token", b"Bearer:", b"Bearer\t", b"", b"Bear", b"ApiKey"))
        return name + rng.choice((b" ", b"", b"  ")) + key.encode() + rng.choice((b"", b" x"))

    def noise() -> bytes:
        return rng.choice((b"Bearer ", b"")) + rng.randbytes(rng.randrange(200))

    def injected() -> bytes:
        return rng.choice(
            (b"Bearer ' OR '1'='1", b"Bearer %", b"Bearer *", b"Bearer null", b"Bearer [object]",
             b"Bearer frs_%" , b"Bearer " + key.encode() + b"'--", b"Bearer \xc0\xae")
        ) + rng.randbytes(rng.randrange(3)).hex().encode()  # fmt: skip

    made = 0
    while made < count:
        value = rng.choice((another, near, mangled, digest, scheme, noise, injected))()
        parts = value.split(b" ", 1)
        is_right = parts[0].lower() == b"bearer" and parts[-1].strip() == key.encode()
        if not is_right:
            made += 1
            yield value


def test_none_of_ten_thousand_wrong_headers_passes(database: Engine) -> None:
    ring = KeyRing(database)
    key = ring.create("me")
    door = Door(ring.recognise)
    assert door.knock("/api/v3/x", (b"authorization", f"Bearer {key}".encode()))[0] == 200
    door.passed.clear()
    answers = Counter(
        door.knock("/api/v3/x", (b"authorization", value))[0]
        for value in wrong_headers(key, 10_000, seed=1)
    )
    assert answers == {401: 10_000}
    assert door.passed == []


def test_first_of_two_headers_counts_and_a_second_changes_nothing() -> None:
    wrong, right = (b"authorization", b"Bearer wrong"), (b"authorization", b"Bearer right")
    assert Door().knock("/api/v3/x", wrong, right)[0] == 401
    assert Door().knock("/api/v3/x", right, wrong)[0] == 200


def test_keys_are_compared_in_constant_time(
    database: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their digests, which tell nothing of the key, and by ``compare_digest`` alone."""
    path = tmp_path / "keys"
    path.write_text(f"me:{FILE_KEY}\n")
    ring = KeyRing(database, file=str(path))
    stored = ring.create("me")
    compared = []

    def compare(a: str, b: str) -> bool:
        compared.append((a, b))
        return False

    monkeypatch.setattr("redux_server.api.auth.hmac.compare_digest", compare)
    assert ring.recognise(FILE_KEY) is None and ring.recognise(stored) is None
    assert len(compared) == 3
    assert all(len(a) == len(b) == 64 for a, b in compared), "digests, never keys"


def test_key_in_another_header_does_not_pass_but_is_told_where_to_put_it() -> None:
    status, body = Door().knock("/api/v3/x", (b"x-api-key", b"right"))
    assert status == 401
    assert "Authorization: Bearer" in json.loads(body)["message"]


# --- keys that are revoked meanwhile --------------------------------------------------------------


def test_keys_that_nobody_can_use_any_more_are_known(
    database: Engine, ring: KeyRing, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"me:{FILE_KEY}")
    ring.create("stays")
    ring.create("goes")
    stays, goes = (key.id for key in ring.list())
    ring.revoke(goes)
    with_file = KeyRing(database, file=str(file))
    assert with_file.revoked_of({stays, goes, "file:me"}) == {goes}
    assert with_file.revoked_of({"file:me"}) == with_file.revoked_of(set()) == set()
    assert ring.revoked_of({"file:me", "never there"}) == {"file:me", "never there"}


@pytest.mark.parametrize("is_revoked", [False, True])
def test_a_body_that_took_its_time_counts_only_if_the_key_still_does(
    is_revoked: bool, ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "_CACHE_S", 0.0)  # which is how long such a body took, or more
    key, bodies = ring.create("me"), []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        while message.get("more_body"):
            message = await receive()
        bodies.append(message["body"])

    messages: list[Any] = [
        {"type": "http.request", "body": b"a", "more_body": True},
        {"type": "http.request", "body": b"b", "more_body": False},
    ]

    async def receive() -> Any:
        if len(messages) == 1 and is_revoked:
            ring.revoke(ring.list()[0].id)
        return messages.pop(0)

    async def send(message: Any) -> None:
        raise AssertionError(message)

    header = (b"authorization", f"Bearer {key}".encode())
    scope = {"type": "http", "path": "/api/v3/x", "headers": [header]}
    middleware = AuthMiddleware(app, recognise=ring.recognise)
    if is_revoked:
        with pytest.raises(Unauthorized):
            asyncio.run(middleware(scope, receive, send))
    else:
        asyncio.run(middleware(scope, receive, send))
    assert bodies == ([] if is_revoked else [b"b"])


@pytest.mark.parametrize("key", ["", "frs_wrong"])
def test_refusals_tell_the_caller_what_to_do_and_no_command_of_the_operator(key: str) -> None:
    text = auth._refusal(key)
    assert "Authorization: Bearer <key>" in text and "whoever runs this server" in text
    assert "flux-redux" not in text
