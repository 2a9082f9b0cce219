"""Pictures as users have them, of several formats and sizes, as clients of a storm send them."""

import base64
import io
import random
from functools import cache
from importlib.resources import files

from PIL import Image, ImageFilter

_SIZES = (  # format, longer side in pixels, how often
    ("PNG", 64, 4),
    ("JPEG", 640, 6),
    ("WEBP", 1024, 4),
    ("PNG", 700, 2),
    ("GIF", 400, 1),
    ("BMP", 500, 1),
    ("AVIF", 800, 1),
    ("JPEG", 3000, 2),
    ("PNG", 1500, 1),
)


@cache
def real_pictures() -> tuple[str, ...]:
    """Data URIs; the frequent ones are there several times."""
    photo = Image.open(io.BytesIO(files("redux_server").joinpath("static/sample.jpg").read_bytes()))
    found: list[str] = []
    for kind, side, often in _SIZES:
        found += [picture_of(photo.convert("RGB"), kind, side)] * often
    return tuple(found)


def picture_of(photo: Image.Image, kind: str, side: int, *, grain: int = 12) -> str:
    """The photo with this longer side, and a camera's grain, as a data URI."""
    scale = side / max(photo.size)
    width, height = (max(16, round(each * scale)) for each in photo.size)
    image = photo.resize((width, height), Image.Resampling.BICUBIC)
    noise = random.Random(side).randbytes(width * height)
    grains = Image.frombytes("L", (width, height), noise).filter(ImageFilter.SMOOTH)
    image = Image.blend(image, grains.convert("RGB"), grain / 255)
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
