"""Every regular expression, and every parse that may meet what a caller sent, has a known bound.

A new one fails here until it stands in the table, with what keeps it short or out of the event
loop. No time is measured: expressions are counted in steps.
"""

import ast
import importlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import redux_server
from server.backtracking import Pattern, worst_steps

ROOT = Path(redux_server.__file__).parent

BOUNDS = {
    "head": "of a request's head, which has at most 32 KiB (api/http_server.py)",
    "length": "a length, which the HTTP parser has read as a 64-bit number before",
    "field": "of a field whose length or pattern is checked before",
    "small": "of a JSON body of at most 64 KiB, or a submit's without its long texts (256 KiB)",
    "off": "off the event loop, and of bounded length",
    "URL": "of a URL of at most 8 KiB (parameters.MAX_URL)",
    "chunk": "of a piece of a body, as large as the socket gives; the parser bounds heads",
    "match": "of what an expression with bounded repeats has matched",
    "remote": "of another server's answer, whose head httpcore bounds; in a worker",
    "child": "of a picture's decoder, in a worker or a child process",
    "ours": "of what we wrote: the database, a signed text, a number of our own",
    "start": "once, when the program starts, from its own text",
}

# Modules that only see what an operator or this program wrote.
NOT_CALLERS = (
    *(
        "bench/",
        "cli/",
        "database/",
        "dispatch/",
        "settings.py",
        "storage/opening.py",
        "metrics.py",
    ),
)

TABLE = """
api/admission.py            check_place                    int                     1  length
api/bodies.py               Body.parse                     loads                   2  off
api/dependencies.py         ids_to_delete                  model_validate          1  small
api/dependencies.py         read_json                      loads                   1  small
api/housekeeping.py         own_gauges                     float                   2  ours
api/middleware.py           -                              re.compile              2  head
api/middleware.py           _declared_length               int                     1  length
api/middleware.py           loggable                       quote                   1  head
api/openapi.py              _result_operation              re.sub                  1  start
api/prediction.py           timestamp                      fromtimestamp           1  ours
api/routes/account.py       _date                          fromtimestamp           1  ours
api/routes/account.py       _read                          model_validate          1  small
api/routes/account.py       usage                          int                     2  small
api/routes/files.py         -                              re.compile              1  head
api/routes/files.py         _part                          int                     4  match
api/routes/lists.py         ListRequest                    pattern=                1  small
api/routes/lists.py         _parse_request                 model_validate          1  small
api/routes/lists.py         _parse_time                    fromisoformat           1  small
api/routes/lists.py         _parse_time_or_ms              fromtimestamp           1  small
api/routes/lists.py         _parse_time_or_ms              int                     1  small
api/routes/models.py        _whole                         int                     2  head
api/routes/models.py        search                         query_params            1  head
api/routes/playground.py    policy_of                      urlsplit                1  start
api/routes/predictions.py   _read_body                     query_params            1  head
api/routes/predictions.py   result                         path_params             1  head
api/routes/stream.py        _has_previews                  query_params            1  head
api/routes/uploads.py       -                              re.compile              3  field
api/routes/uploads.py       -                              re.sub                  1  start
api/routes/uploads.py       _Form.__init__                 MultipartParser         1  chunk
api/routes/uploads.py       _Form.__init__                 parse_options_header    1  head
api/routes/uploads.py       _Form._headers_end             parse_options_header    1  chunk
api/routes/uploads.py       _asked                         int                     2  match
api/routes/uploads.py       _asked                         query_params            1  head
api/routes/uploads.py       _read_ticket_request           model_validate          1  small
api/target_uri.py           -                              re.compile              6  head
api/target_uri.py           TrustedProxies.__contains__    ip_address              1  ours
api/target_uri.py           TrustedProxies.__init__        ip_network              1  start
api/target_uri.py           _apply                         int                     1  match
api/target_uri.py           _first_element                 re.sub                  1  head
coercion.py                 -                              re.compile              3  small
coercion.py                 _number                        float                   1  small
coercion.py                 _number                        int                     1  small
net/fetch.py                -                              re.compile              1  remote
net/fetch.py                ImageFetcher._body             int                     1  remote
net/fetch.py                _redirect_url                  urljoin                 1  remote
net/fetch.py                _retry_after_s                 float                   1  remote
net/fetch.py                _retry_after_s                 parsedate_to_datetime   1  remote
net/guard.py                is_http_url                    urlsplit                1  start
net/guard.py                -                              re.compile              9  URL
net/guard.py                AddressPolicy._is_public       IPv4Address             1  ours
net/guard.py                AddressPolicy._is_public       int                     1  ours
net/guard.py                AddressPolicy.check            ip_address              1  URL
net/guard.py                Opening.parse                  int                     2  start
net/guard.py                _allowed_place                 ip_network              1  start
net/guard.py                _ascii_only                    quote                   1  URL
net/guard.py                _ipv4_literal                  IPv4Address             1  URL
net/guard.py                _ipv6_literal                  IPv6Address             1  URL
net/guard.py                _port_number                   int                     1  match
net/own_addresses.py        is_own                         ip_address              1  ours
parameters.py               -                              re.compile              2  small
parameters.py               _whole                         int                     1  small
parameters.py               parse_request                  model_validate          1  small
parameters.py               parse_size                     int                     2  match
pictures/colours.py         _hlg_light                     float                   1  ours
pictures/colours.py         _pq_nits                       float                   1  ours
pictures/data_uri.py        -                              re.compile              4  field
pictures/decode.py          -                              re.compile             20  child
pictures/decode.py          _Child.read_header             loads                   1  child
pictures/decode.py          is_starved                     int                     1  ours
pictures/decode_child.py    _address_space                 int                     1  ours
pictures/decode_child.py    _first_number                  int                     1  child
pictures/decode_child.py    main                           loads                   1  ours
pictures/dimensions.py      -                              re.compile              1  child
pictures/essence.py         -                              re.compile              4  child
pictures/essence.py         _isobmff                       unpack                  1  child
pictures/essence.py         _png_numbers                   unpack                  1  child
pictures/essence.py         _png_transparency              unpack                  1  child
pictures/essence.py         _tiff_numbers                  unpack                  1  child
pictures/essence.py         _tiff_profile                  unpack                  1  child
pictures/essence.py         orientation_of                 int                     1  child
pictures/essence.py         tiff_number                    int                     1  child
pictures/inline.py          _decoded                       a2b_base64              2  off
pictures/submitted.py       -                              re.compile              1  field
pictures/submitted.py       _is_url                        re.match                1  field
pictures/submitted.py       _is_usable                     urlsplit                1  URL
pictures/submitted.py       _origin                        urlsplit                1  URL
pictures/submitted.py       check_own_url                  urlsplit                1  URL
pictures/upload_records.py  UploadRecords.forget           int                     1  ours
pictures/upload_records.py  UploadRecords.forget_expired   int                     1  ours
pictures/uploads.py         -                              re.compile              1  head
pictures/uploads.py         UploadTicket.check_length      int                     2  length
pictures/uploads.py         UploadTickets.issue            int                     1  ours
pictures/uploads.py         UploadTickets.read             float                   1  match
pictures/uploads.py         UploadTickets.read             int                     2  match
storage/blobs.py            summary                        re.search               2  ours
storage/blobs.py            summary                        re.sub                  1  ours
storage/signing.py          -                              re.compile              1  URL
storage/signing.py          Signer._key_in                 int                     1  match
storage/signing.py          Signer.is_over                 int                     1  match
storage/signing.py          Signer.is_over                 urlsplit                1  URL
storage/signing.py          Signer.key_of                  urlsplit                1  URL
storage/signing.py          Signer.open_key                int                     1  match
storage/signing.py          Signer.path                    int                     1  ours
storage/signing.py          signing_secret                 fromhex                 1  ours
tasks/accepting.py          IdempotencyKeys.forget         int                     1  ours
tasks/accepting.py          _left_of_all                   int                     1  ours
tasks/listing.py            History.count                  int                     1  ours
tasks/listing.py            last_submits                   float                   1  ours
tasks/previews.py           Previews.sweep                 int                     1  ours
tasks/store.py              TaskStore._take_back           int                     1  ours
tasks/store.py              TaskStore.catch_up             int                     1  ours
tasks/store.py              TaskStore.due                  int                     1  ours
tasks/store.py              TaskStore.unbind               int                     1  ours
tasks/stored.py             by_key                         int                     1  ours
tasks/task.py               -                              re.compile              1  head
tasks/usage.py              _set_unless_held               int                     1  ours
webhooks/callback.py        _is_allowed_by_name            ip_address              1  URL
webhooks/delivery.py        WebhookPoster.deliver          int                     1  remote
webhooks/delivery.py        _standard                      b64decode               1  ours
webhooks/outbox.py          Outbox.catch_up                int                     1  ours
webhooks/outbox.py          Outbox.count_open              int                     1  ours
worker/loop.py              Worker._room                   int                     1  ours
worker/main.py              _end_process                   int                     1  ours
worker/previews.py          PreviewSender.offer            float                   1  ours
"""

_PARSES = frozenset(
    {
        *("loads", "load_json", "literal_eval", "unpack", "int", "float", "complex", "Decimal"),
        *("fromisoformat", "fromtimestamp", "strptime", "parsedate", "parsedate_to_datetime"),
        *("urlsplit", "urlparse", "urljoin", "parse_qs", "parse_qsl", "unquote", "quote"),
        *("a2b_base64", "b64decode", "urlsafe_b64decode", "unhexlify", "fromhex", "make_url"),
        *("ip_address", "ip_network", "IPv4Address", "IPv6Address", "UUID", "SimpleCookie"),
        *("parse_options_header", "MultipartParser", "FormParser", "model_validate"),
        *("model_validate_json", "validate_python", "validate_json", "json", "form", "body"),
    }
)
_READ = frozenset({"query_params", "path_params", "cookies"})
_IS_OURS = frozenset({"load", "json_schema"})

# What backtracks over two repeats that can match the same: only where few characters are looked at.
SHORT = {
    r"\s*(?:<\?xml.*?)?<(?:!--.*?-->\s*<)?svg\b": 1024,  # pictures/decode.py looks at as many
    r"<Code>(.*?)</Code>": 4096,  # in an error of a bucket, which is no caller
    r"<Message>(.*?)</Message>": 4096,
    r"<[^>]*>.*": 4096,
    r"<script>(.*?)</script>": 65536,  # the page that comes with the program
}
SEARCHED = {
    r"/files/(?P<sig>[0-9a-f]{32})/(?P<exp>[0-9]{1,12})/(?P<key>[\w./-]{1,256})\Z",
    r"[\x00-\x1f\x7f]",
    r"timeout|connection|http (?:5|429)",
}


def parses() -> Iterator[tuple[str, str, str]]:
    """The file, the function and the parse, wherever one is."""
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(NOT_CALLERS):
            for scope, parse in _parses_in(ast.parse(path.read_text()), ()):
                yield name, ".".join(scope) or "-", parse


def _parses_in(node: ast.AST, scope: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        scope = (*scope, node.name)
    yield from ((scope, parse) for parse in _parses_at(node))
    for child in ast.iter_child_nodes(node):
        yield from _parses_in(child, scope)


def _parses_at(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute) and node.attr in _READ:
        yield node.attr
    if not isinstance(node, ast.Call):
        return
    called = node.func
    name = getattr(called, "attr", None) or getattr(called, "id", "")
    of = called.value if isinstance(called, ast.Attribute) else None
    if isinstance(of, ast.Name) and of.id == "re":
        yield f"re.{name}"
    elif name in _PARSES:
        yield name
    yield from ("pattern=" for keyword in node.keywords if keyword.arg == "pattern")


def rows() -> list[tuple[str, str, str, int, str]]:
    split = (line.split() for line in TABLE.strip().splitlines())
    return [(file, scope, parse, int(count), bound) for file, scope, parse, count, bound in split]


def test_every_parse_stands_in_the_table_with_its_bound() -> None:
    found = Counter(parses())
    known = {(file, scope, parse): count for file, scope, parse, count, _ in rows()}
    new = {place: count for place, count in found.items() if known.get(place) != count}
    gone = known.keys() - found.keys()
    assert not new, f"say what bounds these, and test it if it is not obvious: {new}"
    assert not gone, f"no longer there: {gone}"
    assert {bound for *_, bound in rows()} <= BOUNDS.keys()


@pytest.mark.parametrize(
    ("code", "parse"),
    [
        ("def f(r): return json.loads(r)", "loads"),
        ("def f(r): return r.query_params['page']", "query_params"),
        ("def f(r): return re.search('a+', r)", "re.search"),
        ("class M:\n x: str = Field(pattern='a+')", "pattern="),
        ("async def f(r): return await r.json()", "json"),
    ],
)
def test_walk_finds_a_parse_of_each_kind(code: str, parse: str) -> None:
    assert [found for _, found in _parses_in(ast.parse(code), ())] == [parse]


# --- expressions ----------------------------------------------------------------------------------


def modules() -> Iterator[ModuleType]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        if not {"migrations", "__main__", "decode_child"} & set(parts):
            yield importlib.import_module(".".join(parts).removesuffix(".__init__"))


def compiled() -> dict[str, Pattern]:
    """Every expression that a module of the server holds, and those that functions write down."""
    found: dict[str, Pattern] = {}

    def note(value: Any) -> None:
        if isinstance(value, re.Pattern):
            text = value.pattern
            found[text if isinstance(text, str) else text.decode("latin-1")] = value
        elif isinstance(value, tuple | list | frozenset):
            for each in value:
                note(each)

    for module in modules():
        for value in vars(module).values():
            note(value)
        assert module.__file__ is not None
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            called = getattr(node, "func", None)
            of = getattr(called, "value", None)
            if isinstance(of, ast.Name) and of.id == "re" and called.attr != "compile":
                first = node.args[0]  # type: ignore[attr-defined]
                if isinstance(first, ast.Constant):
                    note(re.compile(first.value))
    return found


EXPRESSIONS = compiled()


def growth(pattern: Pattern, *, is_searched: bool) -> float:
    """By how much the steps grow when the text is twice as long."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        sizes = (600, 1200) if is_searched else (80, 160)
        short, long = (worst_steps(pattern, size, is_searched=is_searched) for size in sizes)
    finally:
        sys.setrecursionlimit(limit)
    return long / short


@pytest.mark.parametrize("text", sorted(EXPRESSIONS))
def test_expression_takes_no_more_than_linearly_many_steps(text: str) -> None:
    if text in SHORT:
        pytest.skip(f"looks at {SHORT[text]} characters at most")
    assert growth(EXPRESSIONS[text], is_searched=text in SEARCHED) < 2.6


def test_exceptions_are_still_there() -> None:
    assert SHORT.keys() | SEARCHED <= EXPRESSIONS.keys()


@pytest.mark.parametrize(
    ("text", "is_searched"),
    [
        (r"(a+)+b", False),
        (r"\s*,?\s*x", False),
        (r"data:(.*);(.*),", False),
        (r"a+b", True),
        (r"(?:x|xx)+y", False),
    ],
)
def test_expression_that_backtracks_is_found_out(text: str, is_searched: bool) -> None:
    pattern = re.compile(text)
    if text in (r"(a+)+b", r"(?:x|xx)+y"):  # these double with each character
        counts = [worst_steps(pattern, n, is_searched=is_searched) for n in (6, 12)]
        assert counts[1] > 8 * counts[0]
    else:
        assert growth(pattern, is_searched=is_searched) > 2.6
