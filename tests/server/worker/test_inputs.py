"""Where a task's picture is read from."""

import re

import pytest
from PIL.Image import Image

from e2e.live import a_picture
from redux_server.net.guard import FetchError
from redux_server.pictures.decode import DecodeError
from redux_server.storage.blobs import Blobs
from redux_server.storage.signing import Signer
from redux_server.worker.inputs import ImageGone, ImageLoader
from server.in_process import Clock

KEY = "0123456789abcdef0123456789abcdef/1/0.png"


class Fetcher:
    """Answers with one picture, and notes what it was asked for."""

    def __init__(self, answer: bytes | Exception) -> None:
        self.answer = answer
        self.asked: list[str] = []

    def fetch(self, url: str) -> bytes:
        self.asked.append(url)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def as_it_is(image: Image) -> Image:
    return image


@pytest.fixture
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Blobs:
    return Blobs(tmp_path_factory.mktemp("blobs"))


@pytest.fixture
def signer(clock: Clock) -> Signer:
    return Signer(b"secret", clock=clock)


@pytest.fixture
def fetcher() -> Fetcher:
    return Fetcher(a_picture(30, 20, "red"))


@pytest.fixture
def loader(blobs: Blobs, signer: Signer, fetcher: Fetcher) -> ImageLoader:
    return ImageLoader(blobs, signer, fetcher)  # type: ignore[arg-type]


def test_foreign_url_is_fetched(loader: ImageLoader, fetcher: Fetcher) -> None:
    image = loader.load("https://example.com/a.png?b=c", as_it_is)
    assert (image.size, image.mode, image.getpixel((0, 0))) == ((30, 20), "RGB", (255, 0, 0))
    assert fetcher.asked == ["https://example.com/a.png?b=c"]


def test_inline_picture_is_read_from_the_store(
    loader: ImageLoader, blobs: Blobs, fetcher: Fetcher
) -> None:
    blobs.put("abc/input", a_picture(40, 50))
    assert loader.load("blob:abc/input", as_it_is).size == (40, 50)
    assert fetcher.asked == []


@pytest.mark.parametrize("host", ["http://127.0.0.1:8000", "https://flux.example.com"])
@pytest.mark.parametrize("age_s", [0, 10_000_000])
def test_our_own_url_is_read_from_the_store_by_any_host_and_even_after_its_time(
    loader: ImageLoader,
    blobs: Blobs,
    signer: Signer,
    clock: Clock,
    fetcher: Fetcher,
    host: str,
    age_s: float,
) -> None:
    blobs.put(KEY, a_picture(40, 50))
    url = host + signer.path(KEY, clock.now + 60)
    clock.now += age_s
    assert loader.load(url, as_it_is).size == (40, 50)
    assert fetcher.asked == []


def test_url_that_only_looks_like_ours_is_fetched(
    loader: ImageLoader, blobs: Blobs, signer: Signer, clock: Clock, fetcher: Fetcher
) -> None:
    blobs.put(KEY, a_picture(40, 50))
    path = re.sub(r"/files/\w+/", f"/files/{'0' * 32}/", signer.path(KEY, clock.now + 60))
    assert loader.load("https://example.com" + path, as_it_is).size == (30, 20)
    assert len(fetcher.asked) == 1


@pytest.mark.parametrize("is_url", [False, True])
def test_deleted_picture_of_ours_is_told(
    loader: ImageLoader, signer: Signer, clock: Clock, fetcher: Fetcher, is_url: bool
) -> None:
    reference = "http://host" + signer.path(KEY, clock.now + 60) if is_url else f"blob:{KEY}"
    with pytest.raises(ImageGone, match="no longer kept"):
        loader.load(reference, as_it_is)
    assert fetcher.asked == []


def test_reason_of_the_fetcher_is_passed_on(loader: ImageLoader, fetcher: Fetcher) -> None:
    fetcher.answer = FetchError("dns", "The host has no usable address.")
    with pytest.raises(FetchError, match="no usable address"):
        loader.load("https://nowhere.example/a.png", as_it_is)


def test_what_is_fetched_must_be_a_picture(loader: ImageLoader, fetcher: Fetcher) -> None:
    fetcher.answer = b"<!DOCTYPE html><html></html>"
    with pytest.raises(DecodeError, match="HTML page"):
        loader.load("https://example.com/a.png", as_it_is)
