"""Blobs in an object store.

What obstore speaks is possible: S3 and what imitates it, Google Cloud Storage, Azure. Credentials,
region and endpoint come from the store's own variables (``AWS_ACCESS_KEY_ID``, ...), which obstore
reads by itself; no secret passes through our settings.
"""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, cast

import obstore
from obstore.exceptions import BaseError
from obstore.store import ObjectStore, from_url

from redux_server.storage.blobs import ObjectBlobs, StorageError, plain_errors, summary

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

_TRY_S = 1.5  # three requests of a check stay below 5 s
# Options given in code replace all that obstore would read of these, so they are passed on.
_CLIENT_OPTIONS = (
    "allow_http",
    "allow_invalid_certificates",
    "proxy_url",
    "proxy_excludes",
    "proxy_ca_certificate",
)
_RETRIES: "RetryConfig" = {
    "max_retries": 4,
    "retry_timeout": timedelta(seconds=8),
    "backoff": {
        "init_backoff": timedelta(milliseconds=200),
        "max_backoff": timedelta(seconds=2),
        "base": 2,
    },
}
_ADVICE = (
    (
        ("/latest/api/token", "/latest/meta-data", "metadata.google.internal", "169.254.169.254"),
        "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the "
        "variables of your store), or run where an instance role gives them",
    ),
    (("builder error",), "a plain http endpoint needs AWS_ALLOW_HTTP=true"),
    (("NoSuchBucket", "NoSuchContainer", "ContainerNotFound"), "the bucket does not exist"),
    (
        # No numbers: durations and names have them, too.
        (
            "AccessDenied",
            "Forbidden",
            "Unauthorized",
            "InvalidAccessKeyId",
            "SignatureDoesNotMatch",
        ),
        "the credentials are not accepted, or may not list, read, write and delete there",
    ),
    (("error sending request", "timed out", "timeout"), "the endpoint does not answer"),
)


class BlobUrlError(ValueError):
    """A ``--blob-url`` that cannot be used; the text says which, and what is allowed."""


class BucketBlobs(ObjectBlobs):
    """Named byte strings under a prefix of a bucket.

    A request that fails is repeated up to four times within some seconds, as obstore does it.
    """

    def __init__(self, url: str, *, environ: Mapping[str, str] = os.environ) -> None:
        self._url = url
        self._environ = environ
        try:
            super().__init__(
                from_url(url, client_options=_client(environ, "20s"), retry_config=_RETRIES)
            )
        except BaseError as error:
            raise BlobUrlError(f"{url!r}: {summary(error)}") from None

    def _write(
        self, key: str, data: bytes | memoryview, mode: Literal["create", "overwrite"]
    ) -> None:
        # A request that is repeated after a lost answer may meet what the first one created.
        try:
            with plain_errors():
                # In parts it would leave hidden pieces behind when it breaks off; ours are small.
                obstore.put(self._store, key, data, use_multipart=False, mode=mode)
        except FileNotFoundError as error:
            raise StorageError(f"{self._url} is not there") from error

    def check(self) -> None:
        """Write, list and delete one small object, each tried once."""
        key = f"probe/{secrets.token_hex(8)}"
        with self._impatient() as store:
            obstore.put(store, key, b"flux-redux", use_multipart=False)
            next(iter(obstore.list(store, "probe", chunk_size=1)), None)
            obstore.delete(store, [key])

    def look(self) -> None:
        """Ask for one name, and write nothing; else like ``check``."""
        with self._impatient() as store:
            next(iter(obstore.list(store, "probe", chunk_size=1)), None)

    @contextmanager
    def _impatient(self) -> Iterator[ObjectStore]:
        limits: RetryConfig = {"max_retries": 0, "retry_timeout": timedelta(seconds=_TRY_S)}
        client = _client(self._environ, f"{_TRY_S}s")
        try:
            yield from_url(self._url, client_options=client, retry_config=limits)
        except (BaseError, FileNotFoundError) as error:
            raise StorageError(f"{self._url} cannot be used: {_advice(error)}") from error


def _client(environ: Mapping[str, str], timeout: str) -> "ClientConfig":
    options: Any = {"timeout": timeout, "connect_timeout": "1500ms"}
    for name in _CLIENT_OPTIONS:
        if value := environ.get(f"AWS_{name.upper()}"):
            options[name] = value
    return cast("ClientConfig", options)


def _advice(error: Exception) -> str:
    text = summary(error)
    known = (advice for signs, advice in _ADVICE if any(sign in text for sign in signs))
    advice = next(known, None)
    return f"{advice} ({text})" if advice else text
