"""The official ``wavespeed`` Python SDK, unmodified, against this server."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import wavespeed
from wavespeed import Client

from e2e.live import (
    LiveServer,
    a_picture,
    data_uri,
    download,
    free_port,
    plain_client,
    wait_until,
)

MODEL = "wavespeed-ai/flux-pro-redux"
FAST = {"size": "512*512", "num_inference_steps": 2}


@pytest.fixture
def client(tiny: LiveServer) -> Iterator[Client]:
    yield Client(api_key=tiny.key, base_url=tiny.base_url)


def run(client: Client, **given: Any) -> list[str]:
    """The output URLs of one task."""
    outputs: list[str] = client.run(MODEL, {**FAST, **given}, poll_interval=0.1)["outputs"]
    return outputs


def test_this_is_the_version_that_is_spoken_of() -> None:
    assert wavespeed.__version__ == "2.0.5"


def test_run_returns_a_url_of_a_png_that_needs_no_key(client: Client, site: str) -> None:
    (url,) = run(client, image=f"{site}/photo.jpg", seed=7)
    assert re.fullmatch(
        r"http://127\.0\.0\.1:\d+/files/[0-9a-f]{32}/\d+/[0-9a-f]{32}/1/0\.png", url
    )
    image = download(url)
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (512, 512))
    assert len(image.getcolors(512 * 512)) > 100, "a picture of a real decoder is not one colour"


def test_png_says_what_made_it_and_keeps_the_prompt_to_itself(client: Client, site: str) -> None:
    (url,) = run(client, image=f"{site}/photo.jpg", seed=7, prompt="a private wish")
    info = download(url).info
    assert info["AI-Generated"] == "true"
    assert "trainedAlgorithmicMedia" in info["XML:com.adobe.xmp"]
    assert info["Software"].startswith("FLUX Redux Server ")
    assert info["Model"].startswith("tiny ")
    assert (info["Seed"], info["Steps"]) == ("7", "2")
    assert "private wish" not in str(info)


def test_module_is_configured_as_documented(tiny: LiveServer) -> None:
    code = """
import json, sys, wavespeed
wavespeed.config.api.base_url = sys.argv[1]
wavespeed.config.api.api_key = sys.argv[2]
print(json.dumps(wavespeed.run(sys.argv[3], json.loads(sys.argv[4]), poll_interval=0.1)))
"""
    body = json.dumps({**FAST, "image": data_uri(a_picture())})
    done = subprocess.run(
        [sys.executable, "-c", code, tiny.base_url, tiny.key, MODEL, body],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (url,) = json.loads(done.stdout)["outputs"]
    assert download(url).size == (512, 512)


def test_four_images_differ_and_carry_seeds_in_a_row(client: Client, site: str) -> None:
    urls = run(client, image=f"{site}/photo.jpg", seed=40, num_images=4)
    images = [download(url) for url in urls]
    assert [image.info["Seed"] for image in images] == ["40", "41", "42", "43"]
    assert len({image.tobytes() for image in images}) == 4


@pytest.mark.parametrize("size", ["768*512", "512*768", "520*1000", "777*513"])
def test_image_has_exactly_the_size_asked_for(client: Client, site: str, size: str) -> None:
    (url,) = run(client, image=f"{site}/teal.png", size=size, num_inference_steps=1)
    width, height = download(url).size
    assert f"{width}*{height}" == size


def test_same_seed_gives_the_same_file_and_another_seed_another(client: Client, site: str) -> None:
    def file(seed: int) -> bytes:
        (url,) = run(client, image=f"{site}/photo.jpg", seed=seed, prompt="a fox")
        with plain_client() as http:
            return http.get(url).content

    assert file(11) == file(11)
    assert file(11) != file(12)


def test_one_image_of_four_is_the_one_its_seed_makes_alone(client: Client, site: str) -> None:
    four = run(client, image=f"{site}/photo.jpg", seed=60, num_images=4)
    (alone,) = run(client, image=f"{site}/photo.jpg", seed=62)
    assert download(four[2]).tobytes() == download(alone).tobytes()


def test_another_picture_or_prompt_gives_another_image(client: Client, site: str) -> None:
    (first,) = run(client, image=f"{site}/photo.jpg", seed=5)
    (picture,) = run(client, image=f"{site}/teal.png", seed=5)
    (prompt,) = run(client, image=f"{site}/photo.jpg", seed=5, prompt="in winter")
    assert len({download(url).tobytes() for url in (first, picture, prompt)}) == 3


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "application/octet-stream"])
def test_image_goes_inline_whatever_it_is_called(client: Client, kind: str) -> None:
    (url,) = run(client, image=data_uri(a_picture(), kind), num_inference_steps=1)
    assert download(url).size == (512, 512)


def test_output_is_taken_as_the_next_image(client: Client, site: str) -> None:
    (first,) = run(client, image=f"{site}/photo.jpg", seed=1)
    (second,) = run(client, image=first, seed=1)
    assert download(second).tobytes() != download(first).tobytes()


def test_task_can_be_asked_for_later(client: Client, site: str) -> None:
    (url,) = run(client, image=f"{site}/teal.png")
    answer = client.get_result(url.split("/")[6])
    assert answer["data"]["outputs"] == [url]


def test_bad_key_is_told(tiny: LiveServer) -> None:
    stranger = Client(api_key="frs_not-a-key", base_url=tiny.base_url)
    with pytest.raises(RuntimeError, match=r"HTTP 401: .*Unknown or revoked API key"):
        run(stranger, image=data_uri(a_picture()))


def test_bad_parameter_is_told_with_its_range(client: Client) -> None:
    with pytest.raises(RuntimeError, match=r"HTTP 400: .*num_images must be an .*from 1 to 4"):
        run(client, image=data_uri(a_picture()), num_images=5)


def test_unknown_model_is_told(client: Client) -> None:
    with pytest.raises(RuntimeError, match=r"HTTP 404: .*available are .*/flux-pro-redux"):
        client.run("wavespeed-ai/flux-dev", {"prompt": "a fox"})


def test_dead_image_url_fails_the_task_with_its_reason_and_is_not_repeated(
    tiny: LiveServer,
) -> None:
    patient = Client(api_key=tiny.key, base_url=tiny.base_url, max_retries=3, retry_interval=0.1)
    ended = '"task ended"'
    before = tiny.log.count(ended)
    with pytest.raises(RuntimeError, match=r"failed \(task_id: \w{32}\): .*127\.0\.0\.1"):
        run(patient, image=f"http://127.0.0.1:{free_port()}/gone.png")
    wait_until(lambda: tiny.log.count(ended) > before, 10, what=lambda: tiny.log)
    assert tiny.log.count(ended) == before + 1
