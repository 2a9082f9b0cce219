"""The page as a person uses it: by the names of what is on it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from e2e.live import LiveServer, a_picture

WAIT_MS = 20_000


class Page:
    """A tab with the page in it."""

    def __init__(self, tab: Any, server: LiveServer) -> None:
        self.tab = tab
        self.server = server
        self.problems: list[str] = []
        self.foreign: list[str] = []
        tab.set_default_timeout(WAIT_MS)
        tab.on("pageerror", lambda error: self.problems.append(str(error)))
        tab.on("console", self._note)
        tab.on("request", self._look)

    def _note(self, message: Any) -> None:
        # The browser itself writes a line for each answer of 4xx or 5xx, and for one that is not.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.problems.append(message.text)

    def _look(self, request: Any) -> None:
        if not request.url.startswith((self.server.base_url, "data:", "blob:")):
            self.foreign.append(request.url)

    def open(self, fragment: str | None = None) -> None:
        """Go there; by default as the server prints it."""
        fragment = f"#key={self.server.key}" if fragment is None else fragment
        self.tab.goto(f"{self.server.base_url}/{fragment}")

    def wait_for_form(self) -> None:
        self.tab.get_by_label("Prompt").wait_for()

    def choose(self, *colours: str, width: int = 64, height: int = 64) -> None:
        """Choose a picture of each colour."""
        files = [
            {
                "name": f"{colour}.png",
                "mimeType": "image/png",
                "buffer": a_picture(width, height, colour),
            }
            for colour in colours
        ]
        self.tab.get_by_label("Picture", exact=True).set_input_files(files)
        self.tab.locator(".tile").nth(len(colours) - 1).wait_for()

    def set(self, **numbers: float) -> None:
        """Set parameters by their names in the API."""
        for name, value in numbers.items():
            self.tab.evaluate("document.querySelectorAll('details').forEach((e) => e.open = true)")
            self.tab.locator(f"#field-{name}").fill(str(value))

    def count(self, number: int) -> None:
        """How many images."""
        self.tab.get_by_role("group", name="Images").get_by_text(str(number), exact=True).click()

    def generate(self) -> None:
        self.tab.get_by_role("button", name="Generate").click()

    @property
    def results(self) -> Any:
        return self.tab.get_by_role("region", name="Results")

    @property
    def progress(self) -> Any:
        return self.tab.get_by_role("status", name="Progress")

    def wait_for_progress(self, text: str) -> str:
        """Wait until the status region says what matches ``text``; returns what it says."""
        self.tab.wait_for_function(
            "(text) => new RegExp(text).test(document.querySelector('[role=status]').textContent)",
            arg=text,
        )
        return str(self.progress.inner_text())

    def images(self) -> list[str]:
        """The addresses of the images that are shown in the results, newest task first."""
        shown = self.results.locator(".shot .open img")
        return [each.get_attribute("src") for each in shown.all()]

    def wait_for_images(self, count: int) -> list[str]:
        """Wait until so many are shown and loaded."""
        self.tab.wait_for_function(
            "(count) => { const all = [...document.querySelectorAll('.shot .open img')];"
            "return all.length === count; }",
            arg=count,
        )
        return self.images()

    def last_task(self) -> dict[str, Any]:
        """The newest task of the key, as the server has it."""
        with self.server.client() as client:
            answer = client.post("/api/v3/predictions", json={"page": 1, "page_size": 1})
        task: dict[str, Any] = answer.json()["data"]["items"][0]
        return task

    def forget_all(self) -> None:
        """Delete all tasks of the key, so that the next test finds none."""
        with self.server.client() as client:
            asked = {"page": 1, "page_size": 100}
            items = client.post("/api/v3/predictions", json=asked).json()["data"]["items"]
            client.post("/api/v3/predictions/delete", json={"ids": [each["id"] for each in items]})

    def check(self) -> None:
        """Nothing went wrong unseen, and nothing was loaded from elsewhere."""
        assert self.problems == []
        assert self.foreign == []


@contextmanager
def open_page(
    browser: Any, server: LiveServer, *, fragment: str | None = None, **how: Any
) -> Iterator[Page]:
    """The page in a browser that never saw it, with ``how`` as playwright's contexts take it."""
    context = browser.new_context(
        viewport=how.pop("viewport", {"width": 1280, "height": 800}), **how
    )
    try:
        page = Page(context.new_page(), server)
        page.forget_all()
        page.open(fragment)
        if fragment is None:
            page.wait_for_form()
        yield page
        page.check()
    finally:
        context.close()


def seconds_in(text: str) -> int:
    """The wait that a status tells of."""
    found = re.search(r"Trying again in (\d+) s", text)
    assert found, text
    return int(found[1])
