"""Paths as they were meant, and URLs as the outermost of several proxies was called."""

import pytest

from redux_server.api.target_uri import TrustedProxies, meant_path, said_by_proxies
from server.in_process import SUBMIT, Api, submit

MODEL = "wavespeed-ai/flux-pro-redux"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (SUBMIT, SUBMIT),
        ("/" + SUBMIT, SUBMIT),
        ("///api//v3///" + MODEL, SUBMIT),
        (SUBMIT + "/", SUBMIT),
        (SUBMIT + "//", SUBMIT),
        ("/api/v3" + SUBMIT, SUBMIT),
        ("/api/v3/" + SUBMIT, SUBMIT),
        ("/api" + SUBMIT, SUBMIT),
        ("/api/v3/api/v3" + SUBMIT, SUBMIT),
        ("/api/v3/api/v2/" + MODEL, "/api/v2/" + MODEL),  # the client's own path is the last
        ("/api/v2/api/v3/media/upload/binary/", "/api/v3/media/upload/binary"),
        ("/api/v3/models/", "/api/v3/models"),
        ("/api/v3/apis/x", "/api/v3/apis/x"),
        ("/api/v3/predictions/api/v3/result", "/api/v3/predictions/api/v3/result"),
        ("//files/a/1/b/0.png", "/files/a/1/b/0.png"),
        ("/docs/", "/docs/"),
        ("/", "/"),
        ("//", "/"),
        ("", ""),
    ],
)
def test_path_is_the_one_that_was_meant(given: str, meant: str) -> None:
    assert meant_path(given) == meant


@pytest.mark.parametrize(
    "path", ["/" + SUBMIT, SUBMIT + "/", "/api/v3" + SUBMIT, "/api" + SUBMIT, "//api/v3//" + MODEL]
)
def test_task_is_taken_under_every_spelling_of_its_path(api: Api, path: str) -> None:
    answer = api.post("http://test" + path, json={"image": "https://example.com/a.png"})
    data = answer.json()["data"]
    assert (answer.status_code, data["model"]) == (200, MODEL)
    poll = "http://test/api/v3/" + data["urls"]["get"].removeprefix("http://test") + "/"
    assert api.get(poll).json()["data"]["id"] == data["id"]


@pytest.mark.parametrize("path", ["/" + SUBMIT, "/api/v3" + SUBMIT, "//api/v3/balance"])
def test_no_spelling_goes_around_the_key(api: Api, path: str) -> None:
    assert api.post("http://test" + path, key="", json={}).status_code == 401


@pytest.mark.parametrize(
    ("headers", "base"),
    [
        ({"X-Forwarded-Proto": "https"}, "https://test"),
        ({"X-Forwarded-Proto": "https, http"}, "https://test"),
        ({"X-Forwarded-Proto": "HTTPS,http,http"}, "https://test"),
        ({"X-Forwarded-Proto": "wss"}, "https://test"),
        ({"X-Forwarded-Proto": "gopher, https"}, "http://test"),
        ({"X-Forwarded-Host": "a.example"}, "http://a.example"),
        ({"X-Forwarded-Host": "a.example, inner:8000", "X-Forwarded-Proto": "https, http"},
         "https://a.example"),
        ({"X-Forwarded-Host": "a.example:8443, b"}, "http://a.example:8443"),
        ({"X-Forwarded-Host": "[2001:db8::1]:8443"}, "http://[2001:db8::1]:8443"),
        ({"X-Forwarded-Host": "a.example", "X-Forwarded-Port": "8443, 80"},
         "http://a.example:8443"),
        ({"X-Forwarded-Port": "443", "X-Forwarded-Proto": "https"}, "https://test"),
        ({"X-Forwarded-Port": "99999"}, "http://test"),
        ({"X-Forwarded-Host": "a/b@c"}, "http://test"),
        ({"X-Forwarded-Host": "a.example", "X-Forwarded-Prefix": "/flux"},
         "http://a.example/flux"),
        ({"X-Forwarded-Prefix": "/../x\"y"}, "http://test"),
        ({"Forwarded": "for=192.0.2.1;proto=https;host=a.example"}, "https://a.example"),
        ({"Forwarded": 'for="[2001:db8::1]:1"; Host="a.example:8443" ; PROTO=https, for=b;host=c'},
         "https://a.example:8443"),
        ({"Forwarded": "host=a.example"}, "http://a.example"),
        ({"Forwarded": "proto=https"}, "https://test"),
        ({"Forwarded": 'host="a\\.example";proto="https"'}, "https://a.example"),
        ({"Forwarded": ";;==\"\"host"}, "http://test"),
        ({"Forwarded": "host=client.example", "X-Forwarded-Host": "a.example"},
         "http://a.example"),
    ],
)  # fmt: skip
def test_urls_are_those_of_the_outermost_proxy(
    api: Api, headers: dict[str, str], base: str
) -> None:
    data = submit(api, headers=headers)
    assert data["urls"]["get"] == f"{base}/api/v3/predictions/{data['id']}/result"


def test_headers_that_come_several_times_are_one_list() -> None:
    names = [(b"x-forwarded-proto", b"https"), (b"x-forwarded-proto", b"http")]
    assert said_by_proxies(names) == {"proto": "https"}


@pytest.mark.parametrize(
    ("entries", "peer", "is_in"),
    [
        (("127.0.0.1", "::1"), "127.0.0.1", True),
        (("127.0.0.1", "::1"), "::1", True),
        (("127.0.0.1",), "::ffff:127.0.0.1", True),
        (("127.0.0.1",), "10.0.0.1", False),
        (("10.0.0.0/8",), "10.9.9.9", True),
        (("*",), "203.0.113.9", True),
        ((), "127.0.0.1", False),
        (("127.0.0.1",), "unix:", False),
    ],
)
def test_trust_is_by_address(entries: tuple[str, ...], peer: str, is_in: bool) -> None:
    assert (peer in TrustedProxies(entries)) is is_in


def test_what_is_no_address_is_named() -> None:
    with pytest.raises(ValueError, match=r"'10.0.0.1/8' is neither"):
        TrustedProxies(["10.0.0.1/8"])
