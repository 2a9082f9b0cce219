from dataclasses import replace
from ipaddress import IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redux_server.net.fetch import ImageFetcher
from redux_server.net.guard import AddressPolicy, FetchError, Target, parse_url, quoted
from server.bad_urls import ALL_MALFORMED, FORBIDDEN_ADDRESSES, PUBLIC_ADDRESSES, loopback_urls

RETRY_WORDS = ("timeout", "connection", "http 5", "http 429")


def test_the_corpus_is_large():
    bad = {url for _, url in ALL_MALFORMED} | set(FORBIDDEN_ADDRESSES) | set(loopback_urls(1))
    assert len(bad) >= 250


@pytest.mark.parametrize("address", FORBIDDEN_ADDRESSES)
def test_addresses_off_the_public_internet_are_refused(address):
    assert not AddressPolicy().allows("h.example", ip_address(address), 443)


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES)
def test_public_addresses_are_allowed(address):
    assert AddressPolicy().allows("h.example", ip_address(address), 443)


@given(st.ip_addresses())
def test_nothing_is_allowed_that_python_calls_private_or_multicast(address):
    if AddressPolicy().allows("h.example", address, 443) and address not in ip_network(
        "64:ff9b::/96"
    ):
        assert address.is_global and not address.is_multicast and not address.is_reserved


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://bücher.example/", "xn--bcher-kva.example"),
        ("http://BÜCHER.example./", "xn--bcher-kva.example"),
        ("http://bu\u0308cher.example/", "xn--bcher-kva.example"),
        ("http://straße.example/", "xn--strae-oqa.example"),
        ("http://例え.テスト/a", "xn--r8jz45g.xn--zckzah"),
        ("http://пример.испытание:8080/", "xn--e1afmkfd.xn--80akhbyknj4f"),
        ("http://xn--bcher-kva.example/", "xn--bcher-kva.example"),
    ],
)
def test_international_hosts_are_looked_up_by_their_names(url, host):
    assert parse_url(url).host == host


@pytest.mark.parametrize(
    "host",
    ["bücher.127.0.0.1", "\uff11\uff12\uff17.0.0.1", "ü.\uff11", "bücher\u200d.example",
     "ü..example", "ü" * 64, "ⓑücher.example", "\ufb00ü.example", "-ü.example", "ü%2e.example",
     "user@ü.example", "ü。example"],
)  # fmt: skip
def test_international_host_is_no_way_around_the_rules(host):
    with pytest.raises(FetchError) as caught:
        parse_url(f"http://{host}/")
    assert caught.value.reason == "host"


@pytest.mark.parametrize(("reason", "url"), ALL_MALFORMED, ids=lambda value: ascii(value)[:60])
def test_malformed_urls_are_refused(reason, url):
    with pytest.raises(FetchError) as caught:
        parse_url(url)
    message = caught.value.public_message
    assert caught.value.reason == reason and message == str(caught.value)
    assert len(message) < 400 and message.isascii() and message.isprintable()


def fetch_reason(url, answers=()):
    """Why a fetch is refused, and what it asked the resolver. The connector must not be reached."""
    asked = []

    def resolver(host, port):
        asked.append((host, port))
        return answers

    def connector(address, port, timeout_s):
        raise AssertionError(f"would connect to {address}")

    with pytest.raises(FetchError) as caught:
        ImageFetcher(AddressPolicy(), resolver=resolver, connector=connector).fetch(url)
    assert not any(word in str(caught.value).lower() for word in RETRY_WORDS)
    return caught.value.reason, asked


@pytest.mark.parametrize(("reason", "url"), ALL_MALFORMED, ids=lambda value: ascii(value)[:60])
def test_malformed_urls_are_neither_resolved_nor_connected_to(reason, url):
    assert fetch_reason(url) == (reason, [])


@pytest.mark.parametrize("url", loopback_urls(8000), ids=ascii)
def test_no_way_to_write_this_machine_is_connected_to(url):
    reason, asked = fetch_reason(url, ["127.0.0.1"])
    assert reason in ("host", "address")
    assert {host for host, _ in asked} <= {"localhost"}


@pytest.mark.parametrize("address", FORBIDDEN_ADDRESSES)
def test_forbidden_literals_are_neither_resolved_nor_connected_to(address):
    host = f"[{address}]" if ":" in address else address
    for url in (f"http://{host}/", f"https://{host}:8443/x?y"):
        reason, asked = fetch_reason(url)
        assert reason == ("host" if "%" in address else "address") and asked == []


@pytest.mark.parametrize("address", FORBIDDEN_ADDRESSES)
def test_names_with_forbidden_addresses_are_not_connected_to(address):
    for answers in ([address], [address, "1.1.1.1"], ["2606:4700::1", "1.1.1.1", address]):
        assert fetch_reason("https://h.example/x", answers) == ("address", [("h.example", 443)])


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h.example", Target("http", "h.example", 80, "/")),
        ("HTTPS://H.Example./a", Target("https", "h.example", 443, "/a")),
        ("http://h.example:8080/a?b=c#d", Target("http", "h.example", 8080, "/a?b=c")),
        ("http://h.example:/?x", Target("http", "h.example", 80, "/?x")),
        ("http://h.example?x=@y", Target("http", "h.example", 80, "/?x=@y")),
        ("http://h.example/a@b:1", Target("http", "h.example", 80, "/a@b:1")),
        ("http://h.example/ä%20b?ü", Target("http", "h.example", 80, "/%C3%A4%20b?%C3%BC")),
        ("http://1.2.3.4/", Target("http", "1.2.3.4", 80, "/")),
        ("http://1.2.3.4./", Target("http", "1.2.3.4", 80, "/")),
        ("http://[2606:4700:0::1111]:81/", Target("http", "2606:4700::1111", 81, "/")),
        (
            "http://[::FFFF:127.0.0.1]/",
            Target("http", str(IPv6Address("::ffff:127.0.0.1")), 80, "/"),
        ),
        ("http://xn--exmple-cua.com/", Target("http", "xn--exmple-cua.com", 80, "/")),
        ("http://my_bucket.s3.example/", Target("http", "my_bucket.s3.example", 80, "/")),
        ("http://localhost/", Target("http", "localhost", 80, "/")),
    ],
)
def test_sound_urls_are_taken_apart(url, expected):
    assert parse_url(url) == expected


def test_host_header_and_url_in_normal_form():
    assert parse_url("http://[2606:4700::1111]:81/x").host_header == "[2606:4700::1111]:81"
    assert parse_url("https://H.example:443/x#y").url == "https://h.example/x"
    assert parse_url("http://h.example:443").url == "http://h.example:443/"


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text):
    for url in (text, "http://" + text):
        try:
            target = parse_url(url)
        except FetchError as error:
            assert error.reason in ("scheme", "host")
        else:
            assert parse_url(target.url) == target
            assert target.path_and_query.isascii() and target.host.isascii()


def test_messages_hold_neither_passwords_nor_queries_nor_retry_words():
    for url in (
        "http://bob:hunter2@h.example/?token=s3cret",
        "http://h.example:0/?token=s3cret",
        "http://connection.timeout.example:0/",
        "http://a..http%205/",
        "connection://h.example/?token=s3cret",
    ):
        with pytest.raises(FetchError) as caught:
            parse_url(url)
        text = str(caught.value).lower()
        assert "hunter2" not in text and "s3cret" not in text
        assert not any(word in text for word in RETRY_WORDS)


def test_quoted_names_are_short_and_ascii():
    assert quoted("a\nb\u202e") == "'a\\nb\\u202e'"
    assert len(quoted("a" * 500)) < 90
    assert quoted("api.TimeOut.example") == "(name withheld)"


def test_check_returns_canonical_addresses():
    assert AddressPolicy().check("h.example", ["1.1.1.1", "2606:4700:0:0::1"], 80) == [
        "1.1.1.1",
        "2606:4700::1",
    ]


@pytest.mark.parametrize("answers", [["1.1.1.1", "127.0.0.1"], ["10.0.0.1", "1.1.1.1"], ["::1"]])
def test_one_forbidden_address_refuses_them_all(answers):
    with pytest.raises(FetchError, match="is not on the public internet") as caught:
        AddressPolicy().check("h.example", answers, 80)
    assert caught.value.reason == "address"
    assert not any(answer in str(caught.value) for answer in answers)


@pytest.mark.parametrize("answers", [[], ["not an address"], ["1.1.1.1", "127.1"]])
def test_no_usable_address(answers):
    with pytest.raises(FetchError) as caught:
        AddressPolicy().check("h.example", answers, 80)
    assert caught.value.reason == "dns"


def test_operator_allows_a_host_by_name_and_no_other():
    policy = AddressPolicy.from_entries(["minio"])
    assert policy.check("minio", ["10.0.0.5"], 80) == ["10.0.0.5"]
    with pytest.raises(FetchError):
        policy.check("minio.example", ["10.0.0.5"], 80)


def test_operator_allows_a_network_under_any_name():
    policy = AddressPolicy.from_entries(["10.1.0.0/16", "fd00::/8", "127.0.0.1"])
    assert policy.check("a", ["10.1.2.3"], 80) and policy.check("b", ["fd00::1", "127.0.0.1"], 443)
    assert policy.check("c", ["64:ff9b::10.1.2.3"], 80)
    for address in ("10.2.0.1", "127.0.0.2", "::ffff:10.1.2.3", "fd00::1%eth0"):
        with pytest.raises(FetchError):
            policy.check("a", [address], 80)


def test_entries_are_normalised():
    policy = AddressPolicy.from_entries(["MinIO.", "[::1]", "10.0.0.5"])
    assert policy.check("minio", ["10.1.1.1"], 80)
    assert policy.check("10.0.0.5", ["10.0.0.5"], 80) and policy.check("::1", ["::1"], 80)


@pytest.mark.parametrize(
    ("entry", "host", "address", "ports"),
    [
        ("minio", "minio", "10.0.0.5", {80, 443}),
        ("minio:9000", "minio", "10.0.0.5", {9000}),
        ("MinIO.:9000", "minio", "10.0.0.5", {9000}),
        ("minio:*", "minio", "10.0.0.5", {22, 80, 443, 6379, 9000, 65535}),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1", {80, 443}),
        ("127.0.0.1:9000", "localhost", "127.0.0.1", {9000}),
        ("10.0.0.0/8", "any.lan", "10.9.9.9", {80, 443}),
        ("10.0.0.0/8:9000", "any.lan", "10.9.9.9", {9000}),
        ("::1", "::1", "::1", {80, 443}),
        ("[::1]:9000", "::1", "::1", {9000}),
        ("fd00::/8", "any.lan", "fd00::7", {80, 443}),
        ("[fd00::/8]:9000", "any.lan", "fd00::7", {9000}),
        ("10.0.0.0/8:9000", "any.lan", "64:ff9b::10.0.0.1", {9000}),
    ],
)
def test_what_is_allowed_is_allowed_at_its_ports_alone(entry, host, address, ports):
    policy = AddressPolicy.from_entries([entry])
    for port in (22, 80, 443, 6379, 9000, 65535):
        if port in ports:
            assert policy.check(host, [address], port)
            continue
        with pytest.raises(FetchError) as caught:
            policy.check(host, [address], port)
        if "64:ff9b" not in address:
            assert caught.value.reason == "port" and f"not at port {port}" in str(caught.value)


def test_openings_of_one_host_add_up():
    policy = AddressPolicy.from_entries(["minio", "minio:9000", "10.0.0.0/8:8080"])
    assert all(policy.check("minio", ["10.0.0.5"], port) for port in (80, 443, 9000, 8080))
    with pytest.raises(FetchError):
        policy.check("minio", ["10.0.0.5"], 22)


def test_a_public_address_of_this_machine_is_none_for_callers():
    own = ip_address("11.22.33.44")
    policy = AddressPolicy(is_own=lambda address: address == own)
    for answers in (["11.22.33.44"], ["1.1.1.1", "11.22.33.44"], ["64:ff9b::11.22.33.44"]):
        with pytest.raises(FetchError, match="this server's own") as caught:
            policy.check("h.example", answers, 443)
        assert caught.value.reason == "address" and "11.22" not in str(caught.value)
    assert policy.check("h.example", ["11.22.33.45"], 443)
    allowed = AddressPolicy.from_entries(["11.22.33.44:9000"])
    allowed = replace(allowed, is_own=policy.is_own)
    assert allowed.check("h.example", ["11.22.33.44"], 9000)
    with pytest.raises(FetchError):
        allowed.check("h.example", ["11.22.33.44"], 443)


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "10.0.0.1/8",
        "http://x/",
        "a b",
        "*.example",
        "127.1",
        ":80",
        "a:",
        "a:b",
        "[::1",
        "[a]:9",
    ],
)
def test_unclear_entries_are_errors(entry):
    with pytest.raises(ValueError, match="neither a host name nor an address"):
        AddressPolicy.from_entries([entry])


@pytest.mark.parametrize("entry", ["minio:0", "minio:65536", "[::1]:99999"])
def test_ports_that_are_none_are_errors(entry):
    with pytest.raises(ValueError, match="1 to 65535"):
        AddressPolicy.from_entries([entry])
