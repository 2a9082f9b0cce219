"""Whether an IP address is one of this very machine's.

The kernel is asked each time, so addresses that come and go are known at once: it sends packets to
an address of its own from that address itself. Nothing is sent to find out.
"""

import socket
from ipaddress import IPv4Address, IPv6Address, ip_address

_ANY_PORT = 9  # a datagram socket that is connected has chosen its route, and has sent nothing


def is_own(address: IPv4Address | IPv6Address) -> bool:
    """Whether packets to ``address`` would stay on this machine."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), _ANY_PORT))
            source = ip_address(probe.getsockname()[0])
            return source == address or source.is_loopback
    except OSError:  # no route, or no such family: nothing will be connected to
        return False
