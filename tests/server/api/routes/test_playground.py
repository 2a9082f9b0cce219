"""The page's files as HTTP answers: types, policy, caching, and how it is left out."""

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import redux_server
from server.in_process import Api

FOLDER = Path(redux_server.__file__).parent / "playground"


def test_page_and_all_it_names_are_served_without_a_key(api: Api) -> None:
    page = api.get("/", key="")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    named = set(re.findall(r'(?:src|href)="(playground/[^"]+)"', page.text))
    modules = {f"playground/{path.name}" for path in FOLDER.glob("*.js")}
    imported = {
        f"playground/{name}"
        for path in FOLDER.glob("*.js")
        for name in re.findall(r'^import .* from "\./([^"]+)";$', path.read_text(), re.MULTILINE)
    }
    assert {"playground/app.js", "playground/style.css", "playground/icon.svg"} <= named
    assert imported | {"playground/app.js"} == modules
    for path in named | modules | {"playground/sample.png"}:
        assert api.get(f"/{path}", key="").status_code == 200, path


def test_policy_lets_no_inline_script_and_no_other_host_in(api: Api) -> None:
    policy = api.get("/", key="").headers["content-security-policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert (rules["script-src"], rules["style-src"], rules["connect-src"]) == ("'self'",) * 3
    assert rules["img-src"] == "'self' blob: data:"
    assert "unsafe" not in policy and rules["frame-ancestors"] == "'none'"


def test_policy_lets_pictures_of_the_public_url_in(build_api: Callable[..., Api]) -> None:
    api = build_api(public_url="https://pictures.example:8443/base")
    policy = api.get("/", key="").headers["content-security-policy"]
    assert "img-src 'self' blob: data: https://pictures.example:8443;" in policy


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/playground/app.js", "text/javascript; charset=utf-8"),
        ("/playground/style.css", "text/css; charset=utf-8"),
        ("/playground/icon.svg", "image/svg+xml"),
        ("/playground/sample.png", "image/png"),
    ],
)
def test_files_have_types_that_browsers_run(api: Api, path: str, kind: str) -> None:
    answer = api.get(path, key="")
    assert answer.headers["content-type"] == kind
    assert answer.headers["x-content-type-options"] == "nosniff"
    head = api.request("HEAD", path, key="")
    assert (head.status_code, head.content) == (200, b"")


def test_a_file_that_the_browser_has_is_not_sent_again(api: Api) -> None:
    first = api.get("/playground/app.js", key="")
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for known in (tag, f'"other", W/{tag}'):
        again = api.get("/playground/app.js", key="", headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
    other = api.get("/playground/app.js", key="", headers={"If-None-Match": '"other"'})
    assert other.status_code == 200


@pytest.mark.parametrize(
    ("accepted", "is_packed"),
    [
        ("gzip, deflate, br", True), ("br;q=1, gzip;q=0.5", True), ("*", True),
        ("identity", False), ("gzip;q=0", False), ("gzip;q=0.000, br", False), ("", False),
    ],
)  # fmt: skip
def test_files_are_compressed_for_who_takes_that(api: Api, accepted: str, is_packed: bool) -> None:
    answer = api.get("/playground/app.js", key="", headers={"Accept-Encoding": accepted})
    assert (answer.headers.get("content-encoding") == "gzip") is is_packed
    assert answer.headers["vary"] == "Accept-Encoding"
    assert answer.content == (FOLDER / "app.js").read_bytes()  # the client unpacks
    packed = len(gzip.compress((FOLDER / "app.js").read_bytes()))
    sent = int(answer.headers["content-length"])
    assert (sent < packed + 100) is is_packed


def test_operator_may_turn_the_page_off(build_api: Callable[..., Api]) -> None:
    api = build_api(playground="off")
    for path in ("/", "/playground/app.js"):
        answer = api.get(path, key="")
        assert (answer.status_code, answer.json()["code"]) == (404, 404)
    assert api.get("/docs", key="").status_code == 200


@pytest.mark.parametrize("path", ["/playground/", "/playground/../settings.py", "/playground/x.js"])
def test_nothing_else_is_served(api: Api, path: str) -> None:
    assert api.get(path, key="").status_code == 404
