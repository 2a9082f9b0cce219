"""Everything a caller can get wrong, sent to a live server: what is said, and that it lives on.

``BAD`` is one table. A row with status 200 is accepted and has to fail afterwards; any other has to
be refused at once. ``ALLOWED`` holds the other side of each edge.
"""

import io
import json
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx
import pytest
from PIL import Image

from e2e.live import MODEL_PATH, LiveServer, a_picture, data_uri, free_port, plain_client
from e2e.picture_site import serving
from redux_server.database.migration import open_database
from redux_server.storage.signing import Signer, signing_secret

GOOD = data_uri(a_picture())
SMALL = {"image": GOOD, "size": "512*512", "num_inference_steps": 1}
MEDIA_ACCESS_FAILED = 1402
# Clients take these for passing troubles and send the same task again (wire contract, 2 and 3).
RETRY_WORDS = ("timeout", "connection", "http 5", "http 429")

IMAGE_FORMS = "an http(s) URL, a data URI (data:image/png;base64,...) or base64 of a picture"
SIZE = '"WIDTH*HEIGHT", each from 512 to 1536'
SEED = "an integer from -1 (random) to 9999999999"
STEPS = "an integer from 1 to 50"
GUIDANCE = "a number from 1 to 20"
IMAGES = "an integer from 1 to 4"
QUALITY = 'one of "exact", "balanced", "fast"'
NO_JSON = "The body is not valid JSON"
NO_FILE = "No such file."


@dataclass
class Scene:
    """What rows refer to: the server, a site to fetch from, a task of ours and another's."""

    server: LiveServer
    site: str
    closed: str
    task: dict[str, Any]
    foreign_task: dict[str, Any]
    signer: Signer

    @property
    def file(self) -> str:
        """The path of an output of ours."""
        return str(httpx.URL(self.task["outputs"][0]).path)

    def fill(self, text: str) -> str:
        return text.replace("{site}", self.site).replace("{closed}", self.closed)


Path = str | Callable[[Scene], str]


@dataclass(frozen=True)
class Bad:
    """One bad input. ``says`` are parts of the message; ``body`` bytes are sent as they are."""

    id: str
    says: tuple[str, ...]
    status: int = 400
    body: Any = None
    method: str = "POST"
    path: Path = MODEL_PATH
    headers: dict[str, str] = field(default_factory=dict)
    key: str | None = None


def value(name: str, given: Any, allowed: str, *, shown: str | None = None) -> Bad:
    """A parameter that is refused: the message names it, what is allowed and what was given."""
    text = json.dumps(given) if shown is None else shown
    return Bad(f"{name}={text[:40]}", (name, allowed, text), body={**SMALL, name: given})


def image(given: Any, *says: str, shown: str | None = None) -> Bad:
    text = shown or json.dumps(given)
    return Bad(f"image={text[:40]}", ("image", *says), body={**SMALL, "image": given})


def raw(id_: str, body: bytes, *says: str, **more: Any) -> Bad:
    return Bad(id_, says or (NO_JSON,), body=body, **more)


def failing(id_: str, reference: str, *says: str) -> Bad:
    """A picture that is only found to be unusable when the task runs."""
    return Bad(id_, says, status=200, body={**SMALL, "image": reference})


def get(id_: str, path: Path, *says: str, status: int = 404, **more: Any) -> Bad:
    return Bad(id_, says, status=status, method="GET", path=path, **more)


def png_of_110_megapixels() -> bytes:
    """A well-formed PNG of some kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 10_000, 11_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(11_000 * 1251), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def picture_as(format_: str, size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 90).convert("RGB").save(buffer, format_)
    return buffer.getvalue()


def with_sign(path: str, sign: str) -> str:
    """``path`` of a file with another signature."""
    _, files, _, *rest = path.split("/")
    return "/".join(("", files, sign, *rest))


def result_of(task_id: str) -> str:
    return f"/api/v3/predictions/{task_id}/result"


def nested(depth: int) -> bytes:
    return b'{"image": ' + b"[" * depth + b"]" * depth + b"}"


PARAMETERS = [
    value("size", "511*512", SIZE),
    value("size", "512*511", SIZE),
    value("size", "1537*1024", SIZE),
    value("size", "1024*1537", SIZE),
    value("size", "0*0", SIZE),
    value("size", "-512*512", SIZE),
    value("size", "1024", SIZE),
    value("size", "1024*1024*1024", SIZE),
    value("size", "1024,1024", SIZE),
    value("size", "1024.5*1024", SIZE),
    value("size", "9999999999999999999*1024", SIZE),
    value("size", "square", SIZE),
    value("size", 1024, SIZE),
    value("size", [1024, 1024], SIZE, shown="an array"),
    value("size", {"width": 1024}, SIZE, shown="an object"),
    value("seed", -2, SEED),
    value("seed", 10_000_000_000, SEED),
    value("seed", 10**400, SEED, shown="(401 characters)"),
    value("seed", 0.5, SEED),
    value("seed", True, SEED),
    value("seed", [1], SEED, shown="an array"),
    value("num_inference_steps", 0, STEPS),
    value("num_inference_steps", -1, STEPS),
    value("num_inference_steps", 51, STEPS),
    value("num_inference_steps", 28.5, STEPS),
    value("num_inference_steps", True, STEPS),
    value("guidance_scale", 0.99, GUIDANCE),
    value("guidance_scale", 20.01, GUIDANCE),
    value("guidance_scale", 0, GUIDANCE),
    value("guidance_scale", -3.5, GUIDANCE),
    value("guidance_scale", False, GUIDANCE),
    value("guidance_scale", {}, GUIDANCE, shown="an object"),
    value("num_images", 0, IMAGES),
    value("num_images", 5, IMAGES),
    value("num_images", 1.5, IMAGES),
    value("num_images", True, IMAGES),
    value("enable_safety_checker", 1, "true or false"),
    value("enable_safety_checker", [], "true or false", shown="an array"),
    value("seed", "seven", SEED),
    value("seed", "0x7", SEED),
    value("seed", "1,000", SEED),
    value("seed", "٧", SEED, shown='"\\u0667"'),
    value("num_inference_steps", "NaN", STEPS),
    value("guidance_scale", "3,5", GUIDANCE),
    value("guidance_scale", "1e400", GUIDANCE),
    value("num_images", "9", IMAGES, shown="got 9"),
    value("enable_safety_checker", "maybe", "true or false"),
    value("quality", "exat", QUALITY),
    value("quality", "ballanced", QUALITY),
    value("prompt", 7, "a text of at most 10000 characters"),
    value("prompt", ["a", "b"], "a text of at most 10000 characters", shown="an array"),
    value("prompt", "x" * 10_001, "at most 10000 characters", shown="(10003 characters)"),
    value("prompt", "\ud800", "a text of at most 10000 characters"),
    value("size", "\udfff", SIZE),
    Bad(
        "several wrong parameters are all named",
        ("seed must be", "got -5", "num_images must be", "got 9", "size must be"),
        body={"image": GOOD, "seed": -5, "num_images": 9, "size": "1x1"},
    ),
]

NOT_A_NUMBER = [
    raw(f"{name}={word}", f'{{"image": "{GOOD}", "{name}": {word}}}'.encode(), name, allowed, shown)
    for name, allowed in (("guidance_scale", GUIDANCE), ("seed", SEED), ("num_images", IMAGES))
    for word, shown in (
        ("NaN", "got NaN"),
        ("Infinity", "got Infinity"),
        ("-Infinity", "got -Infinity"),
        ("1e999", "got Infinity"),
    )
]

PICTURES = [
    Bad("image missing", ("image is required", IMAGE_FORMS), body={"prompt": "no picture"}),
    Bad("empty object", ("image is required", IMAGE_FORMS), body={}),
    Bad("image null", ("image is required", IMAGE_FORMS), body={**SMALL, "image": None}),
    image("", IMAGE_FORMS, 'got ""'),
    image("   ", IMAGE_FORMS),
    image(7, IMAGE_FORMS, "got 7"),
    image(True, IMAGE_FORMS, "got true"),
    image([GOOD], IMAGE_FORMS, "got an array", shown="[...]"),
    image({"url": "https://example.com/a.png"}, IMAGE_FORMS, "got an object"),
    image("ftp://example.com/a.png", IMAGE_FORMS, "ftp://example.com/a.png"),
    image("file:///etc/passwd", IMAGE_FORMS, "file:///etc/passwd"),
    image("gopher://example.com/_", IMAGE_FORMS, "gopher"),
    image("blob:0/input", IMAGE_FORMS, "blob:0/input"),
    image("/etc/passwd", IMAGE_FORMS),
    image("https://", "complete http(s) URL", "'https://'"),
    image("http:///a.png", "complete http(s) URL", "'http:///a.png'"),
    image("http://example.com:99999/a.png", "complete http(s) URL"),
    image("http://[::1/a.png", "complete http(s) URL"),
    image("http://exa mple.com/a.png", "complete http(s) URL"),
    image("http://example.com/" + "a" * 8192, "complete http(s) URL", shown="a long URL"),
    image("data:image/png,hello", "without ;base64"),
    image("data:image/png;base64,", "0 bytes", "no picture"),
    image("data:image/png;base64,!!!!", IMAGE_FORMS),
    image(data_uri(b"<html><body>hello</body></html>", "text/html"), "no picture", shown="<html>"),
    image(data_uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "no picture", shown="<svg>"),
    image("not base64 at all?", IMAGE_FORMS),
    image("\ud800", IMAGE_FORMS),
    image(data_uri(bytes(20 * 2**20 + 1024)), "20.0 MiB", "allowed are 20 MiB", shown="20 MiB"),
]

BODIES = [
    raw("empty body", b""),
    raw("no JSON", b"image=https://example.com/a.png"),
    raw("half a JSON", b'{"image": "https://example.com/a.png"'),
    raw("single quotes", b"{'image': 'https://example.com/a.png'}"),
    raw("no UTF-8", b'{"image": "\xff\xfe"}'),
    raw("an integer of 5000 digits", b'{"image": "a", "seed": ' + b"9" * 5000 + b"}"),
    raw("JSON array", b'[{"image": "a"}]', "must be a JSON object", "got an array"),
    raw("JSON string", b'"a"', "must be a JSON object", 'got "a"'),
    raw("JSON null", b"null", "must be a JSON object", "got null"),
    raw("nested 500 deep", nested(500), "image must be", "got an array"),
    raw("nested 100 000 deep", nested(100_000)),
    raw(
        "a form", b"image=a&size=512", headers={"Content-Type": "application/x-www-form-urlencoded"}
    ),
    raw(
        "multipart",
        b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\na\r\n--x--\r\n',
        headers={"Content-Type": "multipart/form-data; boundary=x"},
    ),
    raw("30 MB", b" " * 30_000_000, "larger than the 27 MiB allowed", status=413),
]

KEYS = [
    Bad("no key", ("API key missing", "Authorization: Bearer"), 401, SMALL, key=""),
    Bad("wrong key", ("Unknown or revoked API key",), 401, SMALL, key="frs_" + "x" * 32),
    Bad("key with a blank after it", ("Unknown",), 401, SMALL, key="a key"),
    *(
        Bad(f"Authorization: {given}", ("API key missing",), 401, SMALL, key="", headers={
            "Authorization": given
        })
        for given in ("Bearer", "Basic YTpi", "Token abc", "frs_abc", "")
    ),
    Bad("X-API-Key", ("Authorization: Bearer",), 401, SMALL, key="", headers={"X-API-Key": "k"}),
    Bad("30 MB without a key", ("API key missing",), 401, b" " * 30_000_000, key=""),
    get("a result without a key", result_of("0" * 32), "API key missing", status=401, key=""),
    get("an unknown path without a key", "/api/v3/nope", "API key missing", status=401, key=""),
]  # fmt: skip

PATHS = [
    get("unknown task", result_of("0" * 32), "No task", "0" * 32),
    get("unknown task, seed's path", f"/api/v2/wavespeed-ai/flux/{'0' * 32}/result", "No task"),
    get("task id too short", result_of("abc"), "No task 'abc'"),
    get("task id with capitals", result_of("A" * 32), "No task"),
    get("task id too long", result_of("0" * 5000), "No task"),
    get("task id of dots", result_of("%2e%2e"), "No task '..'"),
    get("task id of SQL", result_of("'%20or%20'1'='1"), "No task"),
    get("task id with a line break", result_of("a%0d%0ab"), "No task"),
    get("another key's task", lambda at: result_of(at.foreign_task["id"]), "No task"),
    Bad("unknown model", ("No model", "flux-pro-redux"), 404, SMALL, path="/api/v3/some/model"),
    Bad("model without owner", ("No model",), 404, SMALL, path="/api/v3/flux-pro-redux"),
    Bad("unknown API version", ("No model",), 404, SMALL, path="/api/v9/wavespeed-ai/flux-pro"),
    get("GET on a model", MODEL_PATH, "GET is not possible", status=405),
    Bad("PUT on a model", ("PUT is not possible",), 405, SMALL, "PUT"),
    Bad("DELETE on a result", ("not possible",), 405, None, "DELETE", result_of("0" * 32)),
    Bad("POST on a probe", ("POST is not possible",), 405, SMALL, path="/readyz"),
    get("unknown path", "/nope", "No path '/nope'"),
    get("unknown path in the API", "/api/v3/nope", "No path '/api/v3/nope'"),
    get("unknown path, PHP", "/wp-login.php", "No path"),
]

FILES = [
    get("file with a wrong signature", lambda at: with_sign(at.file, "0" * 32), NO_FILE),
    get("file with a short signature", lambda at: with_sign(at.file, "0"), NO_FILE),
    get("file without a signature", lambda at: "/files" + at.file[39:], NO_FILE),
    get("another file under its sign", lambda at: at.file.replace("/0.png", "/1.png"), NO_FILE),
    get("longer life under its sign", lambda at: at.file.replace("/1", "/2", 1), NO_FILE),
    get("no file there", lambda at: at.signer.path("0/1/0.png", time.time() + 60), "was deleted",),
    get(
        "expired file",
        lambda at: at.signer.path(at.file.split("/", 4)[4], time.time() - 1),
        "limited time",
        status=410,
    ),
    get("traversal", "/files/%2e%2e/%2e%2e/%2e%2e/etc/passwd", NO_FILE),
    get("traversal, encoded slashes", "/files/..%2f..%2f..%2fetc%2fpasswd", NO_FILE),
    get("traversal after a signature", lambda at: at.file + "/%2e%2e/%2e%2e/input", NO_FILE),
    get("the database by name", "/files/tasks.db", NO_FILE),
]  # fmt: skip

FAILING = [
    failing("nothing listens", "{closed}/a.png", "127.0.0.1"),
    failing("private address", "http://10.0.0.1/a.png", "not on the public internet"),
    failing("cloud metadata", "http://169.254.169.254/latest/meta-data/", "not on the public"),
    failing("loopback, IPv6", "http://[::1]/a.png", "not on the public internet"),
    failing("loopback, short form", "http://127.1/a.png", "not a usable address"),
    failing("loopback, one number", "http://2130706433/a.png", "not a usable address"),
    failing("unknown host", "http://no-such-host.invalid/a.png", "no-such-host.invalid"),
    failing("user name in the URL", "http://me:secret@127.0.0.1/a.png", "user name"),
    failing("port 0", "http://127.0.0.1:0/a.png", "port"),
    failing("an HTML page", "{site}/page.html", "an HTML page", "Accepted are PNG"),
    failing("status 404", "{site}/404", "status 404"),
    failing("status 500", "{site}/500", "status 500"),
    failing("status 503", "{site}/503", "status 503"),
    failing("status 429", "{site}/429", "status 429"),
    failing("redirects in a circle", "{site}/circle", "redirects more than 10 times"),
    failing("redirect to a private address", "{site}/inwards", "not on the public internet"),
    failing("redirect to a file", "{site}/to-file", "file:"),
    failing("an empty file", "{site}/empty", "empty (0 bytes)"),
    failing("more bytes than fetched", "{site}/large", "20,971,520 bytes"),
    failing("a truncated PNG", data_uri(picture_as("PNG")[:2000]), "PNG", "damaged"),
    failing("a truncated JPEG", data_uri(picture_as("JPEG")[:300]), "JPEG", "damaged"),
    failing("a PNG in name only", data_uri(b"\x89PNG\r\n\x1a\n" + b"hello" * 9), "PNG", "damaged"),
    failing("110 megapixels", data_uri(png_of_110_megapixels()), "110,000,000 pixels"),
    failing("one pixel", data_uri(a_picture(1, 1)), "1 × 1 pixels"),
    failing("a truncated PNG by URL", "{site}/truncated.png", "PNG", "damaged"),
]

BAD = [*PARAMETERS, *NOT_A_NUMBER, *PICTURES, *BODIES, *KEYS, *PATHS, *FILES, *FAILING]

ALLOWED: list[dict[str, Any]] = [
    {"size": "512*512"},
    {"size": "512*1536"},
    {"size": "1536*512"},
    {"size": "1536*1536"},
    {"size": "520*1000"},
    {"size": "513x1023"},
    {"size": " 512 * 768 "},
    {"seed": -1},
    {"seed": 0},
    {"seed": 9_999_999_999, "num_images": 4},
    {"seed": 7.0, "num_inference_steps": 2.0, "num_images": 1.0},
    {"num_inference_steps": 1},
    {"num_inference_steps": 50},
    {"guidance_scale": 1},
    {"guidance_scale": 1.0},
    {"guidance_scale": 20},
    {"num_images": 1},
    {"num_images": 4},
    {"enable_safety_checker": False},
    {"quality": None},
    {"quality": "exact"},
    {"quality": "balanced"},
    {"quality": "fast"},
    {"prompt": "x" * 10_000},
    {"prompt": "\u0000 ☂ \U0001f600 ' \" <b> {0} %s"},
    {"prompt": None, "size": None, "seed": None, "num_images": None, "guidance_scale": None},
    {"enable_base64_output": False, "loras": [], "images": [], "strength": "?", "\ud800": 1},
]


def test_table_is_long_and_its_names_are_unique() -> None:
    names = [row.id for row in BAD]
    assert len(names) >= 150
    assert len(set(names)) == len(names), {name for name in names if names.count(name) > 1}


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.id.encode("ascii", "replace").decode())
def test_bad_input_is_answered_in_words_that_help(bad: Bad, scene: Scene) -> None:
    response = send(bad, scene)
    if bad.status == 200:
        check_failed_task(bad, response, scene)
    else:
        check_refusal(bad, response)


@pytest.mark.parametrize("given", ALLOWED, ids=lambda given: ascii(given)[:60])
def test_value_at_the_edge_is_taken(given: dict[str, Any], live: LiveServer) -> None:
    body = json.dumps({**SMALL, **given})  # as ASCII: httpx could not encode a lone surrogate
    with live.client() as client:
        response = client.post(MODEL_PATH, content=body)
    assert response.status_code == 200, response.text
    task = live.wait(response.json()["data"]["id"])
    assert (task["status"], task["error"], task["code"]) == ("completed", "", 0)
    assert len(task["outputs"]) == (given.get("num_images") or 1)


def test_mislabelled_json_is_read_all_the_same(live: LiveServer) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/octet-stream"):
        with live.client() as client:
            headers = {"Content-Type": kind}
            response = client.post(MODEL_PATH, content=json.dumps(SMALL), headers=headers)
        assert response.status_code == 200, (kind, response.text)


def test_another_keys_task_is_answered_like_an_unknown_one(scene: Scene) -> None:
    def answer(task_id: str) -> tuple[int, str]:
        with scene.server.client() as client:
            response = client.get(result_of(task_id))
        return response.status_code, response.text.replace(task_id, "ID")

    assert answer(scene.foreign_task["id"]) == answer("0" * 32)


def test_server_still_works_after_the_whole_table(scene: Scene) -> None:
    task = scene.server.run(SMALL)
    assert task["status"] == "completed"
    assert scene.server.process.poll() is None
    log = scene.server.log
    assert "Traceback" not in log, log[log.index("Traceback") - 2000 :][:6000]
    assert "worker ended" not in log


def send(bad: Bad, scene: Scene) -> httpx.Response:
    key = scene.server.key if bad.key is None else bad.key
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    headers |= bad.headers
    body = bad.body
    if body is not None and not isinstance(body, bytes):
        body = scene.fill(json.dumps(body)).encode()
    path = bad.path if isinstance(bad.path, str) else bad.path(scene)
    with plain_client(base_url=scene.server.base_url) as client:
        return client.request(bad.method, path, content=body, headers=headers)


def check_refusal(bad: Bad, response: httpx.Response) -> None:
    assert response.status_code == bad.status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"code", "message", "error", "error_code", "data"}
    assert body["code"] == bad.status
    assert body["data"] is None
    assert body["error"] == body["message"]
    assert body["error_code"]
    missing = [part for part in bad.says if part not in body["message"]]
    assert not missing, (missing, body["message"])
    assert len(body["message"]) < 1500
    if bad.status == 401:
        assert response.headers["www-authenticate"] == "Bearer"
    if bad.status == 405:
        allowed = set(response.headers["allow"].split(", "))
        assert allowed in ({"GET"}, {"POST"}, {"GET", "HEAD"})


def check_failed_task(bad: Bad, response: httpx.Response, scene: Scene) -> None:
    assert response.status_code == 200, response.text
    task = scene.server.wait(response.json()["data"]["id"])
    assert task["status"] == "failed", task
    assert task["code"] == MEDIA_ACCESS_FAILED
    assert (task["outputs"], task["has_nsfw_contents"]) == ([], [])
    missing = [part for part in bad.says if part not in task["error"]]
    assert not missing, (missing, task["error"])
    assert not [word for word in RETRY_WORDS if word in task["error"].lower()], task["error"]
    assert "secret" not in task["error"] and "/meta-data" not in task["error"]


@pytest.fixture(scope="module")
def scene(live: LiveServer) -> Iterator[Scene]:
    task = live.run(SMALL)
    with live.client(live.create_key("somebody else")) as client:
        foreign = client.post(MODEL_PATH, json=SMALL).json()["data"]
    engine = open_database(live.database_url)
    signer = Signer(signing_secret(engine), clock=time.time)
    engine.dispose()
    with serving(Site) as site:
        closed = f"http://127.0.0.1:{free_port()}"
        yield Scene(live, site, closed, task, foreign, signer)


REDIRECTS = {
    "/circle": "/circle",
    "/inwards": "http://192.168.0.1/a.png",
    "/to-file": "file:///etc/passwd",
}
PAGES = {
    "/page.html": b"<!DOCTYPE html><html><body>Not a picture</body></html>",
    "/truncated.png": picture_as("PNG")[:2000],
    "/empty": b"",
}


class Site(BaseHTTPRequestHandler):
    """Answers that a picture's host may give."""

    def do_GET(self) -> None:
        if self.path in REDIRECTS:
            self.send_response(302)
            self.send_header("Location", REDIRECTS[self.path])
            self.end_headers()
        elif self.path in PAGES:
            self.send_response(200)
            self.send_header("Content-Length", str(len(PAGES[self.path])))
            self.end_headers()
            self.wfile.write(PAGES[self.path])
        elif self.path == "/large":
            self.send_response(200)
            self.send_header("Content-Length", str(21 * 2**20))
            self.end_headers()
        else:
            self.send_response(int(self.path[1:]))
            self.send_header("Content-Length", "0")
            self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass
