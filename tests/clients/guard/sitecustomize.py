"""Imported by Python at its start when this folder is in PYTHONPATH: keeps it on this machine.

Whatever would leave loopback is refused, and its host is appended to the file ``LEFT_LOOPBACK``.
``LOCAL_NAMES``, a JSON object such as {"api.example.com:443": 8443}, leads a host's port to one of
this machine, as an entry in DNS would.
"""

import _socket
import ipaddress
import json
import os
import sys

_NAMES = json.loads(os.environ.get("LOCAL_NAMES", "{}"))
_LOG = os.environ["LEFT_LOOPBACK"]
_real_getaddrinfo = _socket.getaddrinfo


def _is_local(host):
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return False


def _refuse(event, host):
    with open(_LOG, "a") as log:
        log.write(f"{event} {host}\n")
    raise OSError(f"{host} is not on this machine")


def _watch(event, arguments):
    if event == "socket.getaddrinfo" and not _is_local(arguments[0]):
        _refuse(event, arguments[0])
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[-1]
        if isinstance(address, tuple) and address and not _is_local(address[0]):
            _refuse(event, address[0])


def _getaddrinfo(host, port, *rest, **options):
    name = host.decode() if isinstance(host, bytes) else host
    if (here := _NAMES.get(f"{name}:{port}")) is not None:
        host, port = "127.0.0.1", here
    return _real_getaddrinfo(host, port, *rest, **options)


_socket.getaddrinfo = _getaddrinfo  # below socket's own, for gevent, which replaces that
sys.addaudithook(_watch)
