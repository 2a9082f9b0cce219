"""Signatures, checked by code that shares none with ours."""

import base64
import json
import time

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from redux_server.webhooks.delivery import new_secret, signed_headers
from server.receiver import Received, is_signed

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
