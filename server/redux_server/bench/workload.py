"""What all targets are asked for: pictures, parameters, seeds, and a hash of it all.

Request ``i`` shows picture ``i mod P`` with a seed of its own, so that no request is ever repeated:
a repeated one might be answered out of a cache. Knows no target.
"""

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from redux_server.parameters import MAX_SEED, parse_size
from redux_server.settings import UsageError

DEFAULTS: dict[str, Any] = {
    "prompt": "",
    "size": "1024*1024",
    "num_inference_steps": 28,
    "guidance_scale": 3.5,
    "num_images": 1,
    "enable_safety_checker": True,
}
"""Those of the hosted endpoint, sent in full so that no target has defaults of its own."""

MAX_PICTURE_BYTES = 20 * 2**20
MAX_PICTURES = 1000
_SUFFIXES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
}
_OURS = ("image", "seed", "enable_sync_mode", "enable_base64_output", "webhook", "webhook_url")


@dataclass(frozen=True, slots=True)
class Picture:
    """An input: a URL, or the bytes of a file. ``more`` are parameters of its own."""

    name: str
    data: bytes = field(default=b"", repr=False)
    url: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sent(self) -> str:
        """As the API takes it: its URL, or a data URI."""
        if self.url:
            return self.url
        kind = _SUFFIXES.get(Path(self.name).suffix.lower(), "image/png")
        return f"data:{kind};base64,{base64.b64encode(self.data).decode()}"

    @property
    def digest(self) -> str:
        """SHA-256 of what is sent."""
        return hashlib.sha256(self.url.encode() or self.data).hexdigest()

    def open(self) -> Image.Image | None:
        """The picture in RGB; None for a URL, which is the targets' to fetch."""
        if self.url:
            return None
        with Image.open(io.BytesIO(self.data)) as image:
            return image.convert("RGB")


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the workload, the same for every target."""

    index: int
    picture: int
    seed: int
    size: tuple[int, int]
    num_images: int


class Workload:
    """Pictures and parameters as an endless sequence of requests.

    ``seed`` is that of the first request's image; others count up from it.
    """

    def __init__(
        self, pictures: Sequence[Picture], parameters: Mapping[str, Any], seed: int = 0
    ) -> None:
        self.pictures = list(pictures)
        self.parameters = {**DEFAULTS, **parameters}
        self.seed = seed

    @property
    def num_images(self) -> int:
        """Images that each request asks for."""
        return int(self.parameters["num_images"])

    @property
    def digest(self) -> str:
        """The same for the same pictures, parameters and seeds, whatever the load."""
        told = {
            "pictures": [[picture.digest, dict(picture.more)] for picture in self.pictures],
            "parameters": self.parameters,
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def request(self, index: int) -> Request:
        """The request at ``index``, from 0."""
        place = index % len(self.pictures)
        wanted = {**self.parameters, **self.pictures[place].more}
        # num_images apart, for image i of a request may have its seed + i
        seed = (self.seed + index // len(self.pictures) * self.num_images) % (MAX_SEED + 1)
        return Request(index, place, seed, parse_size(str(wanted["size"])), self.num_images)

    def requests(self, first: int, count: int) -> Iterator[Request]:
        """``count`` requests from ``first`` on."""
        return (self.request(index) for index in range(first, first + count))

    def body(self, request: Request, **more: Any) -> bytes:
        """The JSON that is sent."""
        picture = self.pictures[request.picture]
        told = {
            "image": picture.sent,
            **self.parameters,
            **picture.more,
            "seed": request.seed,
            **more,
        }
        return json.dumps(told).encode()


def read_parameters(given: Sequence[str]) -> dict[str, Any]:
    """``name=value`` of each ``--param``; a value is JSON, or else a text.

    Raises:
        UsageError: not of that form, given twice, or what the bench sets itself.
    """
    parameters: dict[str, Any] = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not separator or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise UsageError(f"--param must be name=value, such as size=512*512; got {text!r}")
        if name in _OURS:
            raise UsageError(f"--param {name}: the bench sets {name} itself")
        if name in parameters:
            raise UsageError(f"--param {name} is given twice")
        parameters[name] = _value(value)
    check_parameters(parameters)
    return parameters


def check_parameters(parameters: Mapping[str, Any], where: str = "--param") -> None:
    """Raise ``UsageError`` for what the bench could not even count or check the answer to."""
    try:
        parse_size(str(parameters.get("size", DEFAULTS["size"])))
    except ValueError:
        raise UsageError(
            f'{where} size must be "WIDTH*HEIGHT", each from 512 to 1536; '
            f"got {parameters['size']!r}"
        ) from None
    count = parameters.get("num_images", 1)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 4:
        raise UsageError(f"{where} num_images must be 1 to 4; got {count!r}")


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, float) and not math.isfinite(value) else value


def read_pictures(place: str) -> list[Picture]:
    """The pictures of a folder, or those that a manifest names; "" is the bundled set.

    A manifest has one JSON object a line: ``image`` (a file beside it, or a URL) and, if wanted,
    parameters for this picture.

    Raises:
        UsageError: nothing there that can be used.
    """
    if not place:
        return bundled_pictures()
    path = Path(place).expanduser()
    if path.is_dir():
        found = sorted(each for each in path.iterdir() if each.suffix.lower() in _SUFFIXES)
        if not found:
            raise UsageError(f"--pictures {place}: no .png, .jpg, .jpeg or .webp in this folder")
        pictures = [_read_file(each) for each in found[:MAX_PICTURES]]
    elif path.is_file():
        pictures = [_read_line(path, n, line) for n, line in _lines(path)][:MAX_PICTURES]
        if not pictures:
            raise UsageError(f"--pictures {place}: the manifest is empty")
    else:
        raise UsageError(f"--pictures {place}: no such folder or manifest")
    return pictures


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} as a manifest ({error}); {_FORM}") from None
    return ((n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip())


_FORM = 'it must have one JSON object a line, such as {"image": "cat.png"}'


def _read_line(manifest: Path, number: int, line: str) -> Picture:
    where = f"{manifest}, line {number}"
    try:
        told = json.loads(line)
        image = told.pop("image")
    except (ValueError, AttributeError, KeyError, TypeError):
        raise UsageError(f"{where}: {_FORM}") from None
    if not isinstance(image, str) or not image:
        raise UsageError(f"{where}: image must be a file's name or a URL")
    if taken := [name for name in _OURS if name in told] or ["num_images"] * ("num_images" in told):
        raise UsageError(f"{where}: {taken[0]} cannot be set for one picture")
    check_parameters(told, where)
    if re.match(r"https?://", image, re.IGNORECASE):
        return Picture(image, url=image, more=told)
    read = _read_file(manifest.parent / image)
    return Picture(read.name, data=read.data, more=told)


def _read_file(path: Path) -> Picture:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > MAX_PICTURE_BYTES:
        raise UsageError(
            f"{path} has {len(data) / 2**20:.1f} MiB; allowed are {MAX_PICTURE_BYTES >> 20} MiB"
        )
    picture = Picture(path.name, data=data)
    try:
        picture.open()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UsageError(f"{path} is no picture that can be read") from None
    return picture


# --- the bundled set ------------------------------------------------------------------------------


def bundled_pictures() -> list[Picture]:
    """The product's two sample pictures and four drawn here, the same on every machine."""
    static = files("redux_server").joinpath("static")
    samples = [
        Picture(name, data=static.joinpath(name).read_bytes())
        for name in ("sample-icon.png", "sample.jpg")
    ]
    return samples + [Picture(f"{draw.__name__}.png", data=_png(draw())) for draw in _DRAWN]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def sun() -> Image.Image:
    """A yellow disk over a green field under a blue sky."""
    image = Image.new("RGB", (512, 512), (120, 185, 235))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 340, 511, 511), fill=(70, 150, 60))
    draw.ellipse((170, 90, 340, 260), fill=(250, 210, 40))
    return image


def apple() -> Image.Image:
    """A red disk with a stalk and a leaf on white."""
    image = Image.new("RGB", (512, 512), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((106, 140, 406, 440), fill=(205, 35, 40))
    draw.rectangle((248, 70, 264, 160), fill=(95, 60, 30))
    draw.ellipse((264, 70, 364, 120), fill=(80, 160, 50))
    return image


def boat() -> Image.Image:
    """A sailing boat on a dark sea at dusk."""
    image = Image.new("RGB", (640, 480), (240, 150, 90))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 320, 639, 479), fill=(20, 50, 100))
    draw.polygon(((180, 310), (460, 310), (410, 370), (230, 370)), fill=(90, 45, 25))
    draw.polygon(((320, 60), (320, 290), (450, 290)), fill=(250, 250, 240))
    draw.polygon(((305, 90), (305, 290), (210, 290)), fill=(225, 220, 205))
    return image


def tiles() -> Image.Image:
    """Violet and cream tiles, like a floor."""
    image = Image.new("RGB", (512, 512), (245, 235, 215))
    draw = ImageDraw.Draw(image)
    for row in range(4):
        for column in range(row % 2, 4, 2):
            left, top = column * 128, row * 128
            draw.rectangle((left, top, left + 127, top + 127), fill=(110, 60, 150))
    return image


_DRAWN = (sun, apple, boat, tiles)
