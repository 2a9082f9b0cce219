"""One browser and one server for the tests of the page.

Debian's Chromium, by the `playwright` wheel: tests in the language of all others, no npm, and no
browser of its own to download.
"""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.live import LiveServer
from playground.driven import Page, open_page

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
MAX_QUEUE = 12
QUEUE = ("--max-queue", str(MAX_QUEUE), "--queue-share", "100")  # one key can fill it


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser without windows, for one file: while playwright is there, its event loop runs."""
    path = next((found for name in CHROMIUMS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium (Debian, Ubuntu: apt install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        # Its sandbox needs rights that containers and root do not have; the pages are our own.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server whose model takes 20 ms a step and paints plain colours."""
    data_dir = tmp_path_factory.mktemp("playground") / "data"
    with LiveServer(data_dir, *QUEUE, model="fake-slow") as running:
        yield running


@pytest.fixture
def page(chromium: Any, server: LiveServer) -> Iterator[Page]:
    """The page as it is opened for the first time, with the key in its address."""
    with open_page(chromium, server) as opened:
        yield opened
