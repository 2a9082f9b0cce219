"""Signatures under webhooks, in the two schemes that receivers know. Pure functions.

Both sign ``{id}.{timestamp}.{body}`` with HMAC-SHA-256 and a secret that is written
``whsec_...``; they differ in how the secret becomes a key and in how the result is written:

* WaveSpeed v3: the key is the text after ``whsec_`` as it stands; ``v3,`` and hexadecimal.
* Standard Webhooks v1 (https://www.standardwebhooks.com): the key is what that text means in
  base64; ``v1,`` and base64.
"""

import base64
import hashlib
import hmac
import secrets

SECRET_PREFIX = "whsec_"
SCHEMES = ("wavespeed", "standard", "both")
_KEY_BYTES = 32


def new_secret() -> str:
    """A secret that serves both schemes: ``whsec_`` and 32 random bytes in base64."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_KEY_BYTES)).decode()


def signed_headers(
    scheme: str, secret: str, *, message_id: str, timestamp: int, body: bytes
) -> dict[str, str]:
    """The headers ``webhook-id``, ``webhook-timestamp`` and ``webhook-signature``.

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
