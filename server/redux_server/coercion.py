"""What a client's values mean: JSON as forms, SDKs and other services' clients send it.

Before validation. A value that can only mean one thing becomes it, one that is no more than left
open becomes absent, and so does one that belongs to another service's parameter of the same name:
the hosted service ignores what it does not declare. All else is left for validation to refuse.
"""

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, Final

from redux_pipelines.contract.batching import is_blank
from redux_pipelines.contract.types import FITS, QUALITIES

_WHOLE = re.compile(r"[+-]?\d{1,20}")
_NUMBER = re.compile(r"[+-]?(?:\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})(?:[eE][+-]?\d{1,2})?")
_BOOLEANS: Final = {
    **dict.fromkeys(("true", "1"), True),
    **dict.fromkeys(("false", "0"), False),
}
_FORMATS: Final = {
    **dict.fromkeys(("jpg", "jpe", "jfif", "image/jpg", "image/jpeg"), "jpeg"),
    "image/png": "png",
    "image/webp": "webp",
}
# What is around a text that was pasted: blanks, byte order marks, marks of direction.
_AROUND = "".join(map(chr, (*range(9, 14), 0x20, 0x85, 0xA0, 0xAD, 0x1680, *range(0x2000, 0x2010),
                            *range(0x2028, 0x2030), 0x205F, 0x2060, 0x3000, 0xFEFF)))  # fmt: skip
_IS_PICTURE = re.compile(r"(?:https?|data):", re.IGNORECASE)


def meant(body: Mapping[str, Any]) -> dict[str, Any]:
    """``body`` with each value as it is meant; nulls and what is left open are not in it."""
    found = {}
    for name, value in body.items():
        read = _READERS.get(name)
        value = value if read is None else read(value)
        is_open = isinstance(value, str) and name != "image" and name in _READERS and not value
        if value is not None and not is_open:
            found[name] = value
    if not found.get("image", "x") and found.get("images"):
        del found["image"]
    return found


def trimmed(text: str) -> str:
    """``text`` without the blanks that were pasted around it."""
    return text.strip(_AROUND)


def _text(value: Any) -> Any:
    return "" if isinstance(value, str) and is_blank(value) else value


def _trimmed(value: Any) -> Any:
    return trimmed(value) if isinstance(value, str) else value


def _number(value: Any) -> Any:
    text = _trimmed(value)
    if not isinstance(text, str) or not text.isascii():
        return text
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else value if text else ""


def _boolean(value: Any) -> Any:
    text = _trimmed(value)
    return _BOOLEANS.get(text.lower(), text) if isinstance(text, str) else value


def _numbers(value: Any) -> Any:
    return [_number(each) for each in value] if isinstance(value, list) else _trimmed(value)


def _format(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = trimmed(value).lower().removeprefix(".")
    return _FORMATS.get(text, text if text in ("", "png", "jpeg", "webp") else value)


def _word(words: tuple[str, ...]) -> Callable[[Any], Any]:
    """Reads one of ``words``, a name that other services have for other things.

    What is nearly one of them is left, so that a slip of the keyboard is told.
    """

    def read(value: Any) -> Any:
        if not isinstance(value, str):
            return None
        text = trimmed(value).lower()
        if text in words:
            return text
        return value if get_close_matches(text[:40], words, n=1, cutoff=0.7) else None

    return read


def _mask(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return trimmed(value) if isinstance(value, str) else None


def _pictures(value: Any) -> Any:
    if isinstance(value, str) and (_IS_PICTURE.match(trimmed(value)) or not trimmed(value)):
        value = [value]
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    return [each for each in map(_trimmed, value) if each is not None and each != ""]


def _url(value: Any) -> Any:
    """Of a webhook; other services have objects and switches of that name."""
    return trimmed(value) if isinstance(value, str) else None


_READERS: Final[dict[str, Callable[[Any], Any]]] = {
    **dict.fromkeys(("seed", "num_inference_steps", "num_images"), _number),
    **dict.fromkeys(("guidance_scale", "redux_strength", "redux_pooling"), _number),
    **dict.fromkeys(("width", "height"), _number),
    **dict.fromkeys(
        ("enable_safety_checker", "enable_sync_mode", "enable_base64_output"), _boolean
    ),
    **dict.fromkeys(("webhook", "webhook_url"), _url),
    **dict.fromkeys(("size", "empty_prompt"), _trimmed),
    "prompt": _text,
    "image": _trimmed,
    "images": _pictures,
    "image_weights": _numbers,
    "mask": _mask,
    "output_format": _format,
    "quality": _word(QUALITIES),
    "fit": _word(FITS),
}
