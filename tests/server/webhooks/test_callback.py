"""What a caller may name as a receiver."""

import pytest

from redux_server.errors import BadRequest
from redux_server.net.guard import AddressPolicy
from redux_server.webhooks.callback import Callback, check_webhook

PUBLIC = AddressPolicy()
ALLOWED = AddressPolicy.from_entries(["hooks.lan", "127.0.0.1:9", "10.0.0.0/8", "fd00::/8"])


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("https://example.com/hook?k=1#part", "https://example.com/hook?k=1"),
        ("HTTPS://Example.COM", "https://example.com/"),
        ("https://example.com:443/a", "https://example.com/a"),
        ("https://1.1.1.1:8443/", "https://1.1.1.1:8443/"),
        ("https://[2606:4700::1111]/x", "https://[2606:4700::1111]/x"),
    ],
)
def test_https_urls_are_kept_in_their_normal_form(url: str, normal: str) -> None:
    assert check_webhook(url, PUBLIC) == normal


@pytest.mark.parametrize(
    "url", ["http://hooks.lan/x", "http://127.0.0.1:9/", "http://10.1.2.3/", "http://[fd00::7]/"]
)
def test_allowed_hosts_may_be_called_over_plain_http(url: str) -> None:
    assert check_webhook(url, ALLOWED) == url
    with pytest.raises(BadRequest, match="--webhook-allow"):
        check_webhook(url, PUBLIC)


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1:9200/",
        "http://10.1.2.3:9200/",
        "https://10.1.2.3:9200/",
    ],
)
def test_allowed_hosts_are_called_at_their_ports_alone(url: str) -> None:
    with pytest.raises(BadRequest, match=r"^webhook .*not at port .* --webhook-allow"):
        check_webhook(url, ALLOWED)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "http://1.1.1.1/",
        "ftp://example.com/",
        "example.com/hook",
        "https://",
        "https://user:s3cret@example.com/",
        "https://exa mple.com/",
        "https://2130706433/",
        "https://0x7f.1/",
        "https://127.1/",
        "https://[::ffff:127.0.0.1]/",
        "https://[64:ff9b::7f00:1]/",
        "https://169.254.169.254/latest/meta-data/",
        "https://192.168.1.1/",
        "https://example.com:0/",
        "https://ex%61mple.com/",
        "https://example.com/" + "a" * 9000,
        "javascript:alert(1)",
        "http://hooks.lan:8080/x",
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(BadRequest, match=r"^webhook ") as caught:
        check_webhook(url, PUBLIC)
    assert "s3cret" not in caught.value.message and "meta-data" not in caught.value.message


def test_url_and_base_survive_storage() -> None:
    for base in ("https://flux.example/", "http://test/#odd"):
        callback = Callback("https://example.com:8443/hook?k=1", base)
        assert Callback.parse(callback.stored()) == callback
        assert callback.origin == "https://example.com:8443"
