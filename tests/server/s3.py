"""An S3 endpoint on loopback, and the variables that lead obstore to it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import httpx
import pytest

BUCKET = "pictures"


@contextmanager
def s3_server(port: int = 0) -> Iterator[str]:
    """An in-memory S3 with one bucket; its URL. Skips where moto is not installed.

    What is in the bucket outlives the server, so that one may go away and come back at ``port``.
    """
    moto = pytest.importorskip(
        "moto.server", reason="needs moto and flask (in the extra dev), an S3 to test with"
    )
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        httpx.put(f"{url}/{BUCKET}", trust_env=False, timeout=60).raise_for_status()
        yield url
    finally:
        server.stop()


@contextmanager
def aws(endpoint: str, **more: str) -> Iterator[None]:
    """The AWS variables of a client of ``endpoint``, and no others; ``more`` replaces some."""
    given = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing-secret",
        "AWS_ALLOW_HTTP": "true",
        # Never to the real one, whatever a test leaves out.
        "AWS_METADATA_ENDPOINT": "http://127.0.0.1:9",
    } | more
    others = [name for name in os.environ if name.startswith("AWS_")]
    with patch.dict(os.environ):
        for name in others:
            del os.environ[name]
        os.environ.update({name: value for name, value in given.items() if value})
        yield
