"""``flux-redux uploads``: what an API key has uploaded to a server, and what of it is to go.

Knows no HTTP.
"""

from collections.abc import Sequence
from contextlib import closing

from redux_server.cli.client import Client, ClientError
from redux_server.cli.progress import note
from redux_server.settings import ClientSettings

_MEBIBYTE = 2**20


def list_uploads(settings: ClientSettings) -> int:
    """One line a file, newest first: id, when it came, size, whether it has come, its name."""
    try:
        with closing(Client(settings.url, settings.key)) as client:
            files, stored_bytes, max_bytes = client.uploads()
    except ClientError as error:
        note(str(error))
        return 1
    for each in files:
        size = f"{each['size']:>12,}"
        name = ascii(each["filename"])[1:-1]
        print(f"{each['id']}  {each['created_at'][:16]}  {size}  {each['status']:<9}  {name}")
    note(f"{stored_bytes / _MEBIBYTE:,.1f} of {max_bytes / _MEBIBYTE:,.0f} MiB")
    return 0


def delete(settings: ClientSettings, upload_ids: Sequence[str]) -> int:
    """Delete files; 1 if some of them were not there."""
    try:
        with closing(Client(settings.url, settings.key)) as client:
            deleted = client.delete_uploads(upload_ids)
    except ClientError as error:
        note(str(error))
        return 1
    print(f"deleted {deleted}")
    if deleted == len(set(upload_ids)):
        return 0
    note("the others are not there; see `flux-redux uploads list`")
    return 1
