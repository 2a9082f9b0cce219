import gc
import itertools
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from contextlib import contextmanager, suppress

import httpcore
import pytest

from redux_server.net import client
from redux_server.net.fetch import ImageFetcher
from redux_server.net.guard import AddressPolicy, FetchError
from server.bad_urls import ALL_MALFORMED, FORBIDDEN_ADDRESSES, loopback_urls

RETRY_WORDS = ("timeout", "connection", "http 5", "http 429")
LOOPBACK = AddressPolicy.from_entries(["127.0.0.0/8:*"])
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40


def answer(body=b"", *headers, status="200 OK"):
    lines = [f"HTTP/1.1 {status}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def with_length(body, *headers):
    return answer(body, f"Content-Length: {len(body)}", *headers)


class FakeStream(httpcore.NetworkStream):
    def __init__(self, web, reply):
        self.web = web
        self.left = reply

    def read(self, max_bytes, timeout=None):
        self.web.timeouts.append(timeout)
        data, self.left = self.left[:max_bytes], self.left[max_bytes:]
        return data

    def write(self, buffer, timeout=None):
        self.web.sent += buffer

    def start_tls(self, ssl_context, server_hostname=None, timeout=None):
        self.web.tls.append((ssl_context, server_hostname))
        return self

    def close(self):
        self.web.closed += 1


class FakeWeb:
    """A resolver and a connector that keep a record and touch no network."""

    def __init__(self, *replies, answers=("93.184.216.34",)):
        self.replies = list(replies)
        self.answers = itertools.cycle([answers]) if isinstance(answers, tuple) else iter(answers)
        self.resolved, self.connected, self.tls, self.timeouts = [], [], [], []
        self.sent, self.closed, self.slept = b"", 0, []

    def resolver(self, host, port):
        self.resolved.append((host, port))
        return next(self.answers)

    def connector(self, address, port, timeout_s):
        self.connected.append((address, port))
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return FakeStream(self, reply)

    def fetcher(self, policy=None, **options):
        options = {"sleep": self.slept.append, **options}
        return ImageFetcher(
            policy or AddressPolicy(), resolver=self.resolver, connector=self.connector, **options
        )


def refusal(fetcher, url):
    with pytest.raises(FetchError) as caught:
        fetcher.fetch(url)
    message = caught.value.public_message
    assert not any(word in message.lower() for word in RETRY_WORDS)
    assert "s3cret" not in message
    return caught.value


# With a recorded network


def test_checked_address_is_connected_to_under_the_name_of_the_url():
    web = FakeWeb(with_length(PICTURE))
    assert web.fetcher().fetch("https://pics.example/a.png?token=s3cret#x") == PICTURE
    assert web.resolved == [("pics.example", 443)]
    assert web.connected == [("93.184.216.34", 443)]
    (context, name), *others = web.tls
    assert name == "pics.example" and not others
    assert context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname
    head = web.sent.decode().lower().splitlines()
    assert head[0] == "get /a.png?token=s3cret http/1.1" and "host: pics.example" in head
    assert "accept-encoding: identity" in head and "connection: close" in head
    assert any(line.startswith("user-agent: flux-redux-server/") for line in head)
    assert not any(line.startswith(("cookie", "authorization", "referer")) for line in head)


def test_literal_addresses_are_not_resolved():
    web = FakeWeb(with_length(PICTURE), with_length(PICTURE))
    assert web.fetcher().fetch("http://1.1.1.1:8080/") == PICTURE
    assert web.fetcher().fetch("https://[2606:4700::1111]/") == PICTURE
    assert web.resolved == [] and web.connected == [("1.1.1.1", 8080), ("2606:4700::1111", 443)]
    assert b"Host: 1.1.1.1:8080\r\n" in web.sent and b"Host: [2606:4700::1111]\r\n" in web.sent


def test_rebinding_cannot_happen_within_one_hop():
    web = FakeWeb(with_length(PICTURE), answers=[["1.1.1.1"], ["127.0.0.1"]])
    assert web.fetcher().fetch("http://rebind.example/") == PICTURE
    assert len(web.resolved) == 1 and web.connected == [("1.1.1.1", 80)]


def test_rebinding_at_a_redirect_to_the_same_host_is_seen():
    moved = answer(b"", "Location: /again", "Content-Length: 0", status="302 Found")
    web = FakeWeb(moved, with_length(PICTURE), answers=[["1.1.1.1"], ["127.0.0.1"]])
    assert refusal(web.fetcher(), "http://rebind.example/").reason == "address"
    assert len(web.resolved) == 2 and web.connected == [("1.1.1.1", 80)]


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://127.0.0.1/", "address"),
        ("http://169.254.169.254/latest/meta-data/", "address"),
        ("//10.0.0.1/x", "address"),
        ("http://[::ffff:127.0.0.1]/", "address"),
        ("http://2130706433/", "host"),
        ("http://user:s3cret@h.example/", "host"),
        ("file:///etc/passwd", "scheme"),
        ("data:image/png;base64,AAAA", "scheme"),
        ("http://[broken/", "redirect"),
        ("\\\\127.0.0.1\\", "host"),
        ("", "redirect"),
    ],
)
@pytest.mark.parametrize("status", ["301 Moved", "303 See Other", "308 Permanent"])
def test_redirects_are_checked_from_scratch(location, reason, status):
    web = FakeWeb(answer(b"", f"Location: {location}", status=status))
    assert refusal(web.fetcher(), "https://h.example/").reason == reason
    assert len(web.connected) == 1


REDIRECTED_TO = [
    *(url for _, url in ALL_MALFORMED if ":" in url and url.isascii() and url.isprintable()),
    *(f"http://[{a}]/" if ":" in a else f"http://{a}/" for a in FORBIDDEN_ADDRESSES),
    *(url for url in loopback_urls(8000) if url.isascii()),
]


@pytest.mark.parametrize("hop", [1, 3])
def test_no_redirect_leads_to_any_url_of_the_table(hop):
    """At whatever hop: a URL that would be refused at first is refused as a redirect too."""
    assert len(REDIRECTED_TO) >= 150
    for url in REDIRECTED_TO:
        onwards = [answer(b"", "Location: /on", status="302 Found")] * (hop - 1)
        inwards = answer(b"", f"Location: {url}", status="307 Temporary Redirect")
        web = FakeWeb(*onwards, inwards, answers=[["1.1.1.1"]] * hop + [["127.0.0.1"]] * 9)
        error = refusal(web.fetcher(), "http://h.example/")
        assert error.reason in ("scheme", "host", "address", "redirect"), url
        assert web.connected == [("1.1.1.1", 80)] * hop, url


def test_redirect_without_location():
    web = FakeWeb(answer(b"", status="302 Found"))
    assert refusal(web.fetcher(), "https://h.example/").reason == "redirect"


def test_three_redirects_are_followed_each_over_a_new_stream():
    hops = [
        answer(b"", f"Location: {place}", "Set-Cookie: a=s3cret", status="302 Found")
        for place in ("/b", "https://other.example/c?d", "//third.example:8443/ä")
    ]
    web = FakeWeb(*hops, with_length(PICTURE))
    assert web.fetcher().fetch("http://h.example/a") == PICTURE
    assert [host for host, _ in web.resolved] == [
        "h.example",
        "h.example",
        "other.example",
        "third.example",
    ]
    assert len(web.connected) == 4 and web.closed == 4
    assert b"GET /%C3%A4 " in web.sent and b"s3cret" not in web.sent


@pytest.mark.parametrize(
    ("location", "host", "line"),
    [
        (b"/my photo.png", "h.example", b"GET /my%20photo.png HTTP"),
        (b"/c?name=my photo&b=\xc3\xa4", "h.example", b"GET /c?name=my%20photo&b=%C3%A4 HTTP"),
        (b"/latin-1/\xe4.png", "h.example", b"GET /latin-1/%E4.png HTTP"),
        (b"  /around  ", "h.example", b"GET /around HTTP"),
        (b"/%20kept?a=%C3%A4", "h.example", b"GET /%20kept?a=%C3%A4 HTTP"),
        (b"other dir/a.png", "h.example", b"GET /d/other%20dir/a.png HTTP"),
        (b"?only=a query", "h.example", b"GET /d/start?only=a%20query HTTP"),
        ("/no\u00a0break\u2028line/👩‍🎨.png".encode(), "h.example",
         b"GET /no%C2%A0break%E2%80%A8line/%F0%9F%91%A9%E2%80%8D%F0%9F%8E%A8.png HTTP"),
        (b'/"quotes"<and>{more}|^`', "h.example",
         b"GET /%22quotes%22%3Cand%3E%7Bmore%7D%7C%5E%60 HTTP"),
        ("http://bücher.example/ä b".encode(), "xn--bcher-kva.example", b"GET /%C3%A4%20b HTTP"),
        (b"HTTP://OTHER.example/x#a b", "other.example", b"GET /x HTTP"),
    ],
)  # fmt: skip
def test_redirects_are_followed_as_browsers_follow_them(location, host, line):
    moved = b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n"
    web = FakeWeb(moved, with_length(PICTURE))
    assert web.fetcher().fetch("http://h.example/d/start") == PICTURE
    assert web.resolved == [("h.example", 80), (host, 80)]
    assert line in web.sent


def test_ten_redirects_are_followed_each_of_them_judged():
    hops = [answer(b"", f"Location: http://h{n}.example/", status="307 Moved") for n in range(10)]
    web = FakeWeb(*hops, with_length(PICTURE))
    assert web.fetcher().fetch("http://h.example/") == PICTURE
    assert len(web.resolved) == 11
    public = [["1.1.1.1"]]
    for inside in range(1, 11):
        web = FakeWeb(*hops, with_length(PICTURE), answers=public * inside + [["10.0.0.1"]] * 9)
        assert refusal(web.fetcher(), "http://h.example/").reason == "address"
        assert len(web.connected) == inside


def test_error_behind_a_redirect_blames_the_host_that_redirects():
    web = FakeWeb(answer(b"", "Location: ftp://h.example/a", status="302 Found"))
    text = str(refusal(web.fetcher(), "https://good.example/a.png"))
    assert text.startswith("The host 'good.example' redirects to a URL that cannot be fetched.")
    assert "'ftp:'" in text and "Check the URL" not in text


@pytest.mark.parametrize(
    ("status", "says"),
    [
        ("404 Not Found", "nothing at this URL"),
        ("410 Gone", "nothing at this URL"),
        ("403 Forbidden", "without a login"),
        ("401 Unauthorized", "without a login"),
        ("429 Slow", "the host's fault"),
        ("503 Busy", "the host's fault"),
        ("500 Oops", "the host's fault"),
    ],
)
def test_status_says_whose_fault_it_is(status, says):
    web = FakeWeb(*[answer(b"", "Content-Length: 0", status=status)] * 2)  # some are asked again
    assert says in str(refusal(web.fetcher(), "http://h.example/a"))


@pytest.mark.parametrize(
    ("error", "says"),
    [(socket.EAI_AGAIN, "name server that this server asks"), (socket.EAI_NONAME, "was not found")],
)
def test_name_server_that_does_not_answer_is_not_the_callers_fault(error, says):
    def resolver(host, port):
        raise socket.gaierror(error, "as the system says it")

    fetcher = ImageFetcher(AddressPolicy(), resolver=resolver)
    caught = refusal(fetcher, "http://h.example/a")
    assert caught.reason == "dns" and says in str(caught)


MEANINGLESS = ["base64", "utf-8", "UTF-8, aws-chunked", "aws-chunked", "none", "binary", "null",
               "identity", "", "image/png", "8bit", "*", "UTF8", "raw", "utf-8,identity",
               "7bit", "application/octet-stream", "charset=utf-8", "plain"]  # fmt: skip


@pytest.mark.parametrize("name", MEANINGLESS)
def test_coding_that_is_none_means_nothing(name):
    web = FakeWeb(with_length(PICTURE, f"Content-Encoding: {name}"))
    assert web.fetcher().fetch("http://h.example/") == PICTURE


@pytest.mark.parametrize("name", ["aws-chunked, gzip", "utf-8, br", "x-gzip", "compress"])
def test_coding_beside_a_meaningless_one_is_one(name):
    web = FakeWeb(with_length(PICTURE, f"Content-Encoding: {name}"))
    assert refusal(web.fetcher(), "http://h.example/").reason == "encoding"


def test_host_that_wants_a_user_agent_is_given_one():
    web = FakeWeb(with_length(PICTURE))
    web.fetcher().fetch("http://h.example/")
    assert b"User-Agent: flux-redux-server/" in web.sent and b"Mozilla/5.0" in web.sent


def test_redirect_circles_end():
    web = FakeWeb(*[answer(b"", "Location: /", status="302 Found")] * 20)
    error = refusal(web.fetcher(), "http://h.example/")
    assert error.reason == "redirect" and "10 times" in str(error) and len(web.connected) == 11


@pytest.mark.parametrize("status", ["404 Not Found", "206 Partial", "204 No Content", "503 Busy"])
def test_only_status_200_is_a_picture(status):
    web = FakeWeb(*[answer(b"", "Content-Length: 0", status=status)] * 2)
    error = refusal(web.fetcher(), "http://h.example/?s3cret")
    assert error.reason == "status" and f"status {status[:3]}" in str(error)


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "br", "identity, gzip", "deflate", "zstd"])
def test_compressed_answers_are_refused(encoding):
    web = FakeWeb(with_length(PICTURE, f"Content-Encoding: {encoding}"))
    assert refusal(web.fetcher(), "http://h.example/").reason == "encoding"


def test_identity_encoding_is_accepted():
    web = FakeWeb(with_length(PICTURE, "Content-Encoding: Identity"))
    assert web.fetcher().fetch("http://h.example/") == PICTURE


def chunked(*chunks):
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))
    return answer(body, "Transfer-Encoding: chunked")


@pytest.mark.parametrize(
    "reply",
    [
        answer(b"", "Content-Length: 1001"),
        answer(b"", "Content-Length: 99999999999999999999"),
        answer(bytes(1001)),
        chunked(*[bytes(100)] * 11),
    ],
    ids=["declared", "declared huge", "until close", "chunked"],
)
def test_too_large_bodies_are_refused(reply):
    error = refusal(FakeWeb(reply).fetcher(max_bytes=1000), "http://h.example/")
    assert error.reason == "too_large" and "1,000 bytes" in str(error)


@pytest.mark.parametrize("reply", [with_length(bytes(1000)), answer(bytes(1000))])
def test_largest_body_is_accepted(reply):
    assert FakeWeb(reply).fetcher(max_bytes=1000).fetch("http://h.example/") == bytes(1000)


def test_framing_cannot_multiply_the_bytes_read():
    reply = answer(b"", status="100 Continue") * 40_000 + with_length(PICTURE)
    web = FakeWeb(reply)
    assert refusal(web.fetcher(max_bytes=1000), "http://h.example/").reason == "too_large"
    assert len(web.timeouts) < 10


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n",
        answer(b"short", "Content-Length: 9"),
        answer(b"x", "Content-Length: 1", "Content-Length: 2"),
        answer(b"x", "Content-Length: -1"),
        answer(b"x", "Transfer-Encoding: gzip, chunked"),
        answer(b"zz\r\n", "Transfer-Encoding: chunked"),
        answer(b"", "X: " + "y" * 300_000),
        answer(b"", *[f"X{n}: {'y' * 99}" for n in range(3000)]),
    ],
)
def test_broken_answers_are_refused(reply):
    assert refusal(FakeWeb(reply, reply).fetcher(), "http://h.example/").reason == "connect"


def test_next_checked_address_is_tried():
    web = FakeWeb(
        httpcore.ConnectError("no route"),
        with_length(PICTURE),
        answers=("2606:4700::1", "1.1.1.1"),
    )
    assert web.fetcher().fetch("http://h.example/") == PICTURE
    assert web.connected == [("2606:4700::1", 80), ("1.1.1.1", 80)] and len(web.resolved) == 1


def test_unreachable_hosts():
    web = FakeWeb(
        *[httpcore.ConnectError("refused"), httpcore.ConnectTimeout("slow")] * 5,
        answers=tuple(f"1.1.1.{n}" for n in range(9)),
    )
    error = refusal(web.fetcher(), "http://h.example/")
    assert error.reason == "connect" and "could not be reached" in str(error)
    assert len(web.connected) == 2 * client.MAX_ADDRESSES_TRIED  # once more, a little later


@pytest.mark.parametrize("failure", [socket.gaierror(-2, "unknown"), UnicodeError("label")])
def test_unknown_hosts(failure):
    def resolver(host, port):
        raise failure

    error = refusal(ImageFetcher(AddressPolicy(), resolver=resolver), "http://h.example/?s3cret")
    assert error.reason == "dns" and "'h.example'" in str(error)


def test_a_fault_of_the_resolver_is_not_the_callers():
    def resolver(host, port):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        ImageFetcher(AddressPolicy(), resolver=resolver).fetch("http://h.example/")


def test_retry_words_in_host_names_are_withheld():
    web = FakeWeb(answers=("10.0.0.1",))
    for name in ("timeout.example", "my-connection.example"):
        assert "withheld" in str(refusal(web.fetcher(), f"http://{name}/"))


# Once more

BUSY = ["429 Too Many", "502 Bad Gateway", "503 Busy", "504 Slow"]


@pytest.mark.parametrize("status", BUSY)
@pytest.mark.parametrize(
    ("header", "slept"),
    [("X: y", 0.5), ("Retry-After: 3", 3.0), ("Retry-After: soon", 0.5), ("Retry-After: -1", 0.5)],
)
def test_a_busy_host_is_asked_once_more_when_it_says(status, header, slept):
    web = FakeWeb(answer(b"", "Content-Length: 0", header, status=status), with_length(PICTURE))
    assert web.fetcher().fetch("http://h.example/") == PICTURE
    assert web.slept == [slept] and len(web.connected) == 2


def test_a_time_to_come_again_may_be_a_date():
    passed = "Retry-After: Sun, 06 Nov 1994 08:49:37 GMT"
    web = FakeWeb(answer(b"", passed, status="503 Busy"), with_length(PICTURE))
    assert web.fetcher().fetch("http://h.example/") == PICTURE and web.slept == [0.0]
    far = "Retry-After: Fri, 31 Dec 2199 23:59:59 -0000"
    web = FakeWeb(answer(b"", far, status="503 Busy"), with_length(PICTURE))
    assert refusal(web.fetcher(), "http://h.example/").reason == "status" and not web.slept


@pytest.mark.parametrize("seconds", ["6", "86400", "9" * 40])
def test_a_host_that_is_busy_for_long_is_not_waited_for(seconds):
    busy = answer(b"", "Content-Length: 0", f"Retry-After: {seconds}", status="503 Busy")
    web = FakeWeb(busy, with_length(PICTURE))
    assert refusal(web.fetcher(), "http://h.example/").reason == "status"
    assert web.slept == [] and len(web.connected) == 1


def test_a_pause_that_ends_after_the_deadline_is_not_made():
    busy = answer(b"", "Content-Length: 0", "Retry-After: 4", status="429 Too Many")
    web = FakeWeb(busy, with_length(PICTURE))
    assert refusal(web.fetcher(deadline_s=3.0), "http://h.example/").reason == "status"
    assert web.slept == [] and len(web.connected) == 1


@pytest.mark.parametrize(
    "failure",
    [b"", answer(b"half", "Content-Length: 9"), httpcore.ConnectError("refused")],
    ids=["reset", "broken off", "refused"],
)
def test_a_host_that_breaks_off_is_asked_once_more(failure):
    web = FakeWeb(failure, with_length(PICTURE))
    assert web.fetcher().fetch("http://h.example/") == PICTURE
    assert web.slept == [0.5] and len(web.connected) == 2


@pytest.mark.parametrize("failure", [b"", answer(b"", "Content-Length: 0", status=BUSY[2])])
def test_nobody_is_asked_a_third_time(failure):
    web = FakeWeb(failure, failure, with_length(PICTURE))
    refusal(web.fetcher(), "http://h.example/")
    assert len(web.connected) == 2


def test_the_second_try_is_checked_like_the_first():
    moved = answer(b"", "Content-Length: 0", status=BUSY[2])
    web = FakeWeb(moved, with_length(PICTURE), answers=[["1.1.1.1"], ["127.0.0.1"]])
    assert refusal(web.fetcher(), "http://rebind.example/").reason == "address"
    assert web.connected == [("1.1.1.1", 80)]


@pytest.mark.parametrize("status", ["404 Not Found", "401 No", "500 Broken"])
def test_what_will_not_be_better_is_not_tried_again(status):
    web = FakeWeb(answer(b"", "Content-Length: 0", status=status), with_length(PICTURE))
    assert refusal(web.fetcher(), "http://h.example/").reason == "status" and not web.slept


def test_advice_names_the_way_out():
    error = refusal(FakeWeb(answers=("10.0.0.1",)).fetcher(), "http://minio/x?s3cret")
    assert "'minio'" in str(error) and "data URI" in str(error) and "--fetch-allow" in str(error)
    assert "10.0.0.1" not in str(error)


def test_proxies_of_the_environment_are_ignored(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    web = FakeWeb(with_length(PICTURE))
    assert web.fetcher().fetch("http://h.example/") == PICTURE
    assert web.connected == [("93.184.216.34", 80)]


# The deadline


def test_the_deadline_spans_all_hops_and_reads():
    now = itertools.count(step=0.7).__next__
    hops = [answer(b"", "Location: /", status="302 Found")] * 3
    web = FakeWeb(*hops, with_length(PICTURE))
    error = refusal(web.fetcher(deadline_s=10, clock=now), "http://h.example/")
    assert error.reason == "timeout" and "longer than 10 s" in str(error)
    assert web.timeouts == sorted(web.timeouts, reverse=True)


def test_a_lookup_that_hangs_is_left_behind():
    release = threading.Event()

    def resolver(host, port):
        release.wait(20)
        return ["1.1.1.1"]

    started = time.monotonic()
    fetcher = ImageFetcher(AddressPolicy(), resolver=resolver, deadline_s=0.2)
    assert refusal(fetcher, "http://h.example/").reason == "timeout"
    assert time.monotonic() - started < 5
    release.set()


def test_lookups_that_hang_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(client, "MAX_LOOKUPS", 2)
    release, running = threading.Event(), []

    def resolver(host, port):
        running.append(host)
        release.wait(20)
        return []

    fetcher = ImageFetcher(AddressPolicy(), resolver=resolver, deadline_s=0.05)
    for _ in range(4):
        assert refusal(fetcher, "http://h.example/").reason == "timeout"
    assert len(running) == 2
    release.set()


# End to end, against servers of the test on 127.0.0.1


@contextmanager
def server(serve, wrap=lambda conversation: conversation):
    """Run ``serve(socket)`` for each connection; yields the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept():
            with suppress(OSError):
                while True:
                    conversation = listener.accept()[0]
                    threading.Thread(target=talk, args=(conversation,), daemon=True).start()

        def talk(conversation):
            with conversation, suppress(OSError), wrap(conversation) as wrapped:
                serve(wrapped)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)
    gc.collect()


def replying(reply):
    def serve(conversation):
        conversation.recv(65536)
        conversation.sendall(reply)

    return serve


def test_a_picture_over_a_real_socket():
    with server(replying(with_length(PICTURE * 300))) as port:
        assert ImageFetcher(LOOPBACK).fetch(f"http://127.0.0.1:{port}/") == PICTURE * 300


def test_loopback_is_never_connected_to_by_default():
    visits = []
    with server(visits.append) as port:
        for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0.0.0.0", "127.1", "[::1]"):
            error = refusal(ImageFetcher(AddressPolicy()), f"http://{host}:{port}/")
            assert error.reason in ("address", "host")
    assert visits == []


def test_a_host_allowed_by_name():
    policy = AddressPolicy.from_entries(["files.internal:*"])
    with server(replying(with_length(PICTURE))) as port:
        fetcher = ImageFetcher(policy, resolver=lambda host, port: ["127.0.0.1"])
        assert fetcher.fetch(f"http://files.internal:{port}/") == PICTURE
        assert refusal(fetcher, f"http://other.internal:{port}/").reason == "address"


def drip(head):
    def serve(conversation):
        conversation.recv(65536)
        for byte in itertools.chain(head, itertools.repeat(65)):
            conversation.sendall(bytes([byte]))
            time.sleep(0.03)

    return serve


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("head", [b"", b"\x16\x03\x03\x40\x00\x02"], ids=["text", "tls"])
def test_slow_drips_end_at_the_deadline(scheme, head):
    with server(drip(head)) as port:
        started = time.monotonic()
        error = refusal(ImageFetcher(LOOPBACK, deadline_s=0.5), f"{scheme}://127.0.0.1:{port}/")
        assert time.monotonic() - started < 5
    assert error.reason in ("timeout", "tls", "connect")


def test_slow_body_ends_at_the_deadline():
    def serve(conversation):
        conversation.recv(65536)
        conversation.sendall(answer(b"", "Content-Length: 1000"))
        drip(b"")(conversation)

    with server(serve) as port:
        started = time.monotonic()
        error = refusal(ImageFetcher(LOOPBACK, deadline_s=0.5), f"http://127.0.0.1:{port}/")
        assert error.reason == "timeout" and 0.4 < time.monotonic() - started < 5


def test_silent_server_ends_at_the_deadline():
    with server(lambda conversation: time.sleep(2)) as port:
        fetcher = ImageFetcher(LOOPBACK, deadline_s=0.3)
        assert refusal(fetcher, f"http://127.0.0.1:{port}/").reason == "timeout"


def test_closed_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert refusal(ImageFetcher(LOOPBACK), f"http://127.0.0.1:{port}/").reason == "connect"


def test_endless_bodies_in_parallel_do_not_fill_the_memory():
    def serve(conversation):
        conversation.recv(65536)
        conversation.sendall(answer(b""))
        while True:
            conversation.sendall(bytes(2**18))

    def fetch(port):
        reasons.append(refusal(fetcher, f"http://127.0.0.1:{port}/").reason)

    reasons, peak = [], 0
    fetcher = ImageFetcher(LOOPBACK, open_file=tempfile.TemporaryFile, deadline_s=60)
    with server(serve) as port:
        threads = [threading.Thread(target=fetch, args=(port,)) for _ in range(32)]
        before = resident_bytes()
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            peak = max(peak, resident_bytes())
            time.sleep(0.02)
    assert reasons == ["too_large"] * 32
    assert peak - before < 64 * 2**20


def resident_bytes():
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except FileNotFoundError:
        pytest.skip("needs /proc")


def test_plain_http_behind_https_is_a_tls_fault():
    with server(replying(with_length(PICTURE))) as port:
        assert refusal(ImageFetcher(LOOPBACK), f"https://127.0.0.1:{port}/").reason == "tls"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -batch"
    subject = "-subj /CN=pics.example -addext subjectAltName=DNS:pics.example"
    files = "-keyout key.pem -out cert.pem"
    arguments = f"{command} {subject} {files}".split()
    subprocess.run(arguments, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def tls_server(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    names = []
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    wrap = lambda conversation: context.wrap_socket(conversation, server_side=True)  # noqa: E731
    with server(replying(with_length(PICTURE)), wrap) as port:
        yield port, names


def loopback_fetcher():
    return ImageFetcher(LOOPBACK, resolver=lambda host, port: ["127.0.0.1"])


def test_self_signed_certificates_are_refused(tls_server):
    port, _ = tls_server
    error = refusal(loopback_fetcher(), f"https://pics.example:{port}/")
    assert error.reason == "tls" and "valid certificate" in str(error)


def test_certificate_is_checked_against_the_name_of_the_url(tls_server, certificate, monkeypatch):
    port, names = tls_server
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
    assert loopback_fetcher().fetch(f"https://pics.example:{port}/") == PICTURE
    assert refusal(loopback_fetcher(), f"https://other.example:{port}/").reason == "tls"
    assert refusal(loopback_fetcher(), f"https://127.0.0.1:{port}/").reason == "tls"
    assert names == ["pics.example", "other.example", None]
