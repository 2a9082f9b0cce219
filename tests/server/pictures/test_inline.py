"""Base64 in pieces: the same bytes as Python's decoder gives for the whole, or the same refusal."""

import base64
import io
import json
import random
from pathlib import Path

import pytest

from e2e.live import a_picture
from redux_server.errors import BadRequest
from redux_server.pictures.inline import MAX_BYTES, decode, decode_into, payload_of
from redux_server.pictures.long_texts import set_aside

PICTURE = a_picture() + random.Random(0).randbytes(1000)


def in_pieces(text: bytes, size: int) -> bytes:
    file = io.BytesIO()
    chunks = [text[at : at + size] for at in range(0, len(text), size)]
    count = decode_into(file, chunks, "image", len(text))
    assert count == len(file.getvalue())
    return file.getvalue()


@pytest.mark.parametrize("more", [0, 1, 2], ids=["unpadded", "two", "one"])
@pytest.mark.parametrize("size", [1, 3, 4, 7, 64, 10_000])
def test_any_pieces_give_the_whole(size: int, more: int) -> None:
    data = PICTURE + b"x" * ((-len(PICTURE)) % 3 + more)
    plain = base64.b64encode(data)
    assert in_pieces(plain, size) == data
    assert in_pieces(plain.rstrip(b"="), size) == data
    assert in_pieces(base64.urlsafe_b64encode(data), size) == data
    assert in_pieces(base64.encodebytes(data), size) == data
    assert decode(plain.decode()) == data


@pytest.mark.parametrize("size", [1, 4, 9, 10_000])
@pytest.mark.parametrize(
    "wrong",
    [b"\\", b"*", "ü".encode(), b"=", b"==AAAA", b"AA==AAAA"],
    ids=["backslash", "star", "letter", "padding", "more", "groups"],
)
def test_what_is_not_base64_is_refused_in_any_pieces(wrong: bytes, size: int) -> None:
    text = base64.b64encode(PICTURE[: len(PICTURE) // 3 * 3])
    with pytest.raises(BadRequest, match="image must be an http"):
        in_pieces(text + wrong + text, size)


def test_nothing_looks_for_the_head_of_a_data_uri_beyond_its_length() -> None:
    with pytest.raises(BadRequest, match="image must be"):
        payload_of("data:image/png" + ";a" * 10_000 + ",", "image")


TEXT = base64.b64encode(PICTURE).decode()
PERCENT = TEXT.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
URL_SAFE = base64.urlsafe_b64encode(PICTURE).decode()
URIS = {
    "as documented": f"data:image/png;base64,{TEXT}",
    "no type": f"data:;base64,{TEXT}",
    "capitals": f"DATA:IMAGE/PNG;BASE64,{TEXT}",
    "a name": f"data:image/png;name=my%20photo.png;base64,{TEXT}",
    "a name with parentheses": f"data:image/png;name=image(1).png;base64,{TEXT}",
    "a name with a comma": f"data:image/png;name=a,b.png;base64,{TEXT}",
    "a name with blanks": f"data:image/png;name=my photo.png;base64,{TEXT}",
    "a name in UTF-8": f"data:image/png;filename=bücher.png;base64,{TEXT}",
    "a long name": f"data:image/png;name={'%C3%A4' * 255}.png;base64,{TEXT}",
    "a quoted charset": f'data:image/png;charset="utf-8";base64,{TEXT}',
    "an apostrophe": f"data:image/png;name=it's.png;base64,{TEXT}",
    "blanks before base64": f"data:image/png; base64,{TEXT}",
    "blanks everywhere": f"data: image/png ; charset=utf-8 ; base64 , {TEXT}",
    "two parameters": f"data:image/jpeg;charset=utf-8;name=a.jpg;base64,{TEXT}",
    "a parameter after": f"data:image/png;base64;name=a.png,{TEXT}",
    "an odd type": f"data:image/vnd.adobe.photoshop+x;base64,{TEXT}",
    "octets": f"data:application/octet-stream;base64,{TEXT}",
    "percent-encoded": f"data:image/png;base64,{PERCENT}",
    "percent-encoded, small": "data:;base64," + PERCENT.replace("%2B", "%2b").replace("%2F", "%2f"),
    "all percent-encoded": "data:image/png;base64," + "".join(f"%{ord(c):02x}" for c in TEXT),
    "percent-encoded lines": "data:image/png;base64," + TEXT[:76] + "%0D%0A" + TEXT[76:] + "%20",
    "lines": "data:image/png;base64,\n" + base64.encodebytes(PICTURE).decode(),
    "lines of Windows": "data:image/png;base64," + TEXT[:76] + "\r\n" + TEXT[76:] + "\r\n",
    "url-safe": f"data:image/png;base64,{URL_SAFE}",
    "no padding": f"data:image/png;base64,{TEXT.rstrip('=')}",
    "url-safe, no padding": f"data:;base64,{URL_SAFE.rstrip('=')}",
    "blanks ahead": f" \t\ndata:image/png;base64,{TEXT}",
    "a mark ahead": f"\ufeffdata:image/png;base64,{TEXT}",
    "a blank without a break ahead": f"\u00a0data:image/png;base64,{TEXT}",
    "without data:": f"image/png;base64,{TEXT}",
    "base64 alone": f"base64,{TEXT}",
    "plain": TEXT,
    "plain, with lines": base64.encodebytes(PICTURE).decode(),
    "plain, percent-encoded": PERCENT,
}


@pytest.mark.parametrize("uri", URIS.values(), ids=URIS)
def test_data_uri_is_read_as_it_is_written(uri: str) -> None:
    assert decode(uri) == PICTURE


@pytest.mark.parametrize(
    "uri", [each for each in URIS.values() if TEXT in each], ids=lambda each: each[:40]
)
@pytest.mark.parametrize("is_ascii", [True, False], ids=["escaped", "as it is"])
def test_long_data_uri_is_read_as_a_short_one(uri: str, is_ascii: bool, tmp_path: Path) -> None:
    whole = PICTURE[: len(PICTURE) // 3 * 3]
    data = whole + random.Random(1).randbytes(69_999)  # is left on the disk
    long = uri.replace(TEXT, base64.b64encode(data).decode())
    document = json.dumps({"image": long, "n": 1}, ensure_ascii=is_ascii)
    for text in (document, document.replace("/", "\\/")):
        with (tmp_path / "body").open("w+b") as file:
            file.write(text.encode())
            file.flush()
            rest, texts = set_aside(file, len(text.encode()))
            image = json.loads(rest)["image"]
            assert len(rest) < 6000
            payload = payload_of(image, "image")
            into = io.BytesIO()
            decode_into(into, texts.chunks(payload), "image", texts.size_bytes(payload))
        assert into.getvalue() == data


@pytest.mark.parametrize("size", [1, 2, 3, 5, 10_000])
@pytest.mark.parametrize("wrong", [b"%", b"%2", b"%zz", b"%25", b"%3DAAAA"])
def test_escape_that_is_no_base64_is_refused_in_any_pieces(wrong: bytes, size: int) -> None:
    with pytest.raises(BadRequest, match="image must be an http"):
        in_pieces(base64.b64encode(PICTURE[: len(PICTURE) // 3 * 3]) + wrong, size)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        (f"data:image/png,{TEXT}", "without ;base64"),
        (f"data:image/png;charset=base64,{TEXT}", "without ;base64"),
        (f"data:text/plain,data:image/png;base64,{TEXT}", "without ;base64"),
        (f"data:image/png;base64,data:image/png;base64,{TEXT}", "image must be"),
        ("data:image/png;base64,", "0 bytes"),
        ("data:", "image must be"),
        (f"blob:http://h/{TEXT}", "image must be"),
        ("C:\\photos\\a.png", "image must be"),
    ],
)
def test_what_is_no_data_uri_in_base64_is_refused(uri: str, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        decode(uri)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"%PDF-1.7" + bytes(99), "a PDF document"),
        (b"8BPS" + bytes(99), "a Photoshop file"),
        (b"<!doctype html><html>" + bytes(99), "an HTML page"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>" + bytes(99), "an SVG drawing"),
        (b"PK\x03\x04" + bytes(99), "an archive"),
        (b"\0\0\0\x18ftypqt  " + bytes(99), "a video"),
    ],
)
def test_inline_file_of_another_kind_is_named(data: bytes, kind: str) -> None:
    with pytest.raises(
        BadRequest, match=f"the {len(data)} bytes sent are no pic.*{kind}. Pictures"
    ):
        decode("data:image/png;base64," + base64.b64encode(data).decode())


def test_a_picture_over_the_limit_is_refused_before_it_is_whole() -> None:
    file = io.BytesIO()
    text = base64.b64encode(PICTURE + bytes(2 * MAX_BYTES))
    chunks = [text[at : at + 2**20] for at in range(0, len(text), 2**20)]
    with pytest.raises(BadRequest, match=r"about 40.0 MiB; allowed are 20 MiB"):
        decode_into(file, chunks, "image", len(text))
    assert len(file.getvalue()) <= MAX_BYTES
