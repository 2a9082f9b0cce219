"""What the kernel says of addresses; nothing is sent."""

import socket
import subprocess
import sys
from ipaddress import ip_address

import pytest

from redux_server.net.own_addresses import is_own


@pytest.mark.parametrize("text", ["127.0.0.1", "127.8.9.10"])
def test_loopback_is_own(text: str) -> None:
    assert is_own(ip_address(text))


@pytest.mark.parametrize("text", ["192.0.2.1", "2001:db8::1", "255.255.255.255", "224.0.0.1"])
def test_addresses_of_others_and_of_nobody_are_not(text: str) -> None:
    assert not is_own(ip_address(text))


def test_what_an_interface_has_is_own() -> None:
    """Whatever this machine would send from."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no route")
        assert is_own(ip_address(probe.getsockname()[0]))


NAMESPACE = """
import subprocess
from ipaddress import ip_address
from redux_server.net.own_addresses import is_own
subprocess.run("ip link set lo up && ip address add 11.22.33.44/32 dev lo", shell=True, check=True)
address, other = ip_address("11.22.33.44"), ip_address("11.22.33.45")
assert is_own(address) and not is_own(other)
subprocess.run("ip address del 11.22.33.44/32 dev lo", shell=True, check=True)
assert not is_own(address), "addresses come and go"
subprocess.run("ip address add 2606:4700::1/128 dev lo nodad", shell=True, check=True)
assert is_own(ip_address("2606:4700::1"))
"""


def test_public_addresses_come_and_go() -> None:
    """In a network of its own, which has nothing but a loopback interface."""
    tried = subprocess.run(["unshare", "-rn", "ip", "link"], capture_output=True)
    if tried.returncode:
        pytest.skip("no network namespace can be made here")
    subprocess.run(["unshare", "-rn", sys.executable, "-c", NAMESPACE], check=True, timeout=60)
