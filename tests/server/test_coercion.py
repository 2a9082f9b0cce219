"""Values as forms, SDKs and other services' clients send them: meant, absent, or refused."""

from typing import Any

import pytest

from redux_server.coercion import meant, trimmed
from redux_server.parameters import parse_request
from server.in_process import SUBMIT, Api

URL = "https://example.com/a.png"


def parsed(name: str, value: Any) -> Any:
    return getattr(parse_request({"image": URL, name: value}), name)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("seed", each, 7) for each in ("7", " 7 ", "+7", "7.0", 7.0, "7e0", "007")),
        ("seed", "-1", -1),
        ("seed", "9999999999", 9_999_999_999),
        ("num_inference_steps", "28", 28),
        ("num_images", "4", 4),
        *(("guidance_scale", each, 3.5) for each in ("3.5", " 3.50\n", "35e-1", "+3.5")),
        ("guidance_scale", "3", 3.0),
        ("redux_strength", ".5", 0.5),
        ("redux_pooling", "9", 9),
        *(("enable_safety_checker", each, False) for each in ("false", "FALSE", " False ", "0")),
        *(("enable_sync_mode", each, True) for each in ("true", "True", "1")),
        *(("output_format", each, "jpeg") for each in ("jpg", "JPG", ".jpg", "image/jpeg", "JPEG")),
        *(("output_format", each, "png") for each in ("PNG", "image/png", " png ", ".png")),
        *(("output_format", each, "webp") for each in ("WebP", "image/webp")),
        ("quality", " Fast ", "fast"),
        ("fit", "CENTER", "center"),
        ("size", " 1024x768\n", "1024*768"),
        ("mask", [f" {URL} "], URL),
        ("images", f"{URL} ", [URL]),
        ("images", [f"\t{URL}", "", None], [URL]),
        ("webhook_url", " https://example.com/hook\n", "https://example.com/hook"),
    ],
)
def test_value_counts_as_it_is_meant(name: str, value: Any, expected: Any) -> None:
    if name == "images":  # the first that is image again counts once
        given = parse_request({"image": "https://example.com/b.png", name: value})
        assert given.images == expected
        return
    assert parsed(name, value) == expected


OPTIONAL = [
    *("prompt", "size", "seed", "num_inference_steps", "guidance_scale", "num_images"),
    *(
        "enable_safety_checker",
        "enable_sync_mode",
        "enable_base64_output",
        "webhook_url",
        "webhook",
    ),
    *("quality", "images", "image_weights", "redux_strength", "redux_pooling", "fit", "mask"),
    *("empty_prompt", "output_format"),
]


@pytest.mark.parametrize("value", ["", "  ", "\n", "\u00a0", None])
@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_field_that_is_left_open_is_absent(name: str, value: Any) -> None:
    plain = parse_request({"image": URL, "seed": 1} if name != "seed" else {"image": URL})
    given = {"image": URL, "seed": 1, name: value}
    assert parse_request(given).digest() == plain.digest()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("quality", each) for each in (90, 1, 0.9, True, "high", "hd", "auto", "90", "standard")),
        *(("quality", each) for each in ("low", "medium", "best", "ultra", [], {}, ["fast"])),
        *(("fit", each) for each in ("cover", "contain", "fill", "crop", "inside", 3, True, {})),
        *(("mask", each) for each in (True, False, 0, {}, [], {"url": "x"}, 1.5)),
        *(("images", each) for each in (True, False, 2, {}, [])),
        *(("webhook", each) for each in (True, {"url": "https://example.com"}, 1, [])),
        *(("webhook_url", each) for each in (False, {})),
    ],
)
def test_what_is_another_services_parameter_is_absent(name: str, value: Any) -> None:
    plain = parse_request({"image": URL, "seed": 1})
    assert parse_request({"image": URL, "seed": 1, name: value}).digest() == plain.digest()


@pytest.mark.parametrize(
    "prompt", [" ", "\n\n", "\t \r\n", "\u00a0", "\u3000", "\u200b", "\ufeff", "\u2028 \u00ad"]
)
def test_prompt_of_blanks_is_no_prompt(prompt: str, api: Api) -> None:
    plain, blank = ({"image": URL, "seed": 1, "prompt": each} for each in ("", prompt))
    assert parse_request(blank).digest() == parse_request(plain).digest()
    assert parse_request(blank).shape == parse_request(plain).shape
    answer = api.post(SUBMIT, json=blank)
    assert answer.json()["data"]["input"]["prompt"] == ""


def test_prompt_with_something_to_see_stays_as_it_is() -> None:
    assert parse_request({"image": URL, "prompt": "  a fox\n"}).prompt == "  a fox\n"


@pytest.mark.parametrize("around", [" ", "\n", "\r\n", "\u00a0", "\u200b", "\ufeff", "\u202f \t"])
def test_blanks_pasted_around_a_url_are_none_of_it(around: str, api: Api) -> None:
    sent = f"{around}{URL}{around}"
    assert trimmed(sent) == URL
    answer = api.post(SUBMIT, json={"image": sent, "mask": sent, "images": [URL, sent]})
    given = answer.json()["data"]["input"]
    assert (given["image"], given["mask"], given["images"]) == (URL, URL, [URL])


def test_url_with_a_space_in_its_path_is_taken(api: Api) -> None:
    for url in ("https://example.com/my photo.png", "https://example.com/a?name=my photo"):
        assert api.post(SUBMIT, json={"image": url}).status_code == 200


def test_what_stands_for_a_long_text_is_not_cut() -> None:
    assert trimmed("\0" + "ab" * 32) == "\0" + "ab" * 32


def test_what_is_no_parameter_is_left_alone() -> None:
    assert meant({"image": URL, "other": "", "more": " x "}) == {
        "image": URL, "other": "", "more": " x ",
    }  # fmt: skip
