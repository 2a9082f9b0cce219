"""A client and its user in front of the live server: what is asked of it, what must come of it.

The picture that a client brings must be, pixel for pixel, the one that a plain HTTP request with
the same parameters makes: so its parameters arrived, and its download is whole.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from clients.environments import environment
from clients.sandbox import Sandbox
from clients.takeover import HOST, Takeover
from e2e.live import MODEL_PATH, LiveServer, download, free_port, prediction, wait_until
from e2e.picture_site import PICTURES

MODEL = MODEL_PATH.removeprefix("/api/v3/")
SIZE = (512, 512)
STEPS = 4
REFUSALS = {
    "bad key": r"Unknown or revoked API key",
    "bad parameter": r"num_images must be an .*from 1 to 4",
    "dead URL": r"host '127\.0\.0\.1' could not be reached",
}


@dataclass(frozen=True)
class Client:
    """A client of others: ``title`` and ``version`` for people, ``pins`` for the installer.

    ``driver`` calls it, unless it is a program. ``mute`` names the cases in which it keeps the
    server's words to itself, with what it says instead. ``checkout`` is its folder in
    CLIENT_SOURCES, if no registry has it. With ``has_fixed_host`` a proxy answers for that host.
    """

    title: str
    version: str
    pins: str
    driver: str = ""
    mute: Mapping[str, str] = field(default_factory=dict)
    checkout: str = ""
    has_fixed_host: bool = False


@dataclass
class Trial:
    """One client's user, with a key of their own and a home with a picture in it."""

    client: Client
    live: LiveServer
    site: str
    home: Path
    reference: "Reference"
    source: str = ""
    proxy: Takeover | None = None

    def __post_init__(self) -> None:
        self.key = self.live.create_key(f"{self.client.title} {self.client.version}")
        self.picture = self.home / "icon.png"
        self.picture.write_bytes(PICTURES["/icon.png"])
        self.answers: dict[str, Any] = {}

    def sandbox(self, names: Mapping[str, int] | None = None, **variables: str) -> Sandbox:
        """The user's shell, with these variables set."""
        if self.proxy and not names:
            names, variables = self.proxy.names, {**self.proxy.trust, **variables}
        return Sandbox(environment(self.client.pins), self.home, variables, names or {})

    @property
    def body(self) -> dict[str, Any]:
        """Parameters that make the same picture whoever sends them."""
        return body(f"{self.site}/icon.png")

    def inputs(self, **changes: Any) -> list[str]:
        """Its parameters as ``--input`` of command lines takes them."""
        wanted = {**self.body, **changes}
        return [part for name, value in wanted.items() for part in ("--input", f"{name}={value}")]

    def job(self, url: str | None = None) -> dict[str, Any]:
        """What drivers are told."""
        return {
            "url": self.live.base_url if url is None else url,
            "key": self.key,
            "model": MODEL,
            "body": self.body,
            "file": str(self.picture),
            "source": self.source,
            "dead": f"http://127.0.0.1:{free_port()}/gone.png",
        }

    def run_plain(self) -> str:
        """The id of a task that this user ran by plain HTTP."""
        with self.live.client(self.key) as http:
            task: str = prediction(http.post(MODEL_PATH, json=self.body))["id"]
        self.wait(task)
        return task

    def wait(self, task: str) -> None:
        """Until a task of this user is completed."""
        path = f"/api/v3/predictions/{task}/result"
        with self.live.client(self.key) as http:
            wait_until(lambda: prediction(http.get(path))["status"] == "completed", 60)

    def answer(self, case: str) -> dict[str, Any]:
        """What the driver got for ``case``; all its cases are tried at the first question."""
        if not self.answers:
            sandbox = self.sandbox()
            self.answers = sandbox.drive(self.client.driver, self.job())
            assert sandbox.left_loopback == []
            assert self.source or self.answers["version"] == {"value": self.client.version}
        found: dict[str, Any] = self.answers[case]
        return found

    def check(self, case: str) -> None:
        """A case must bring the right picture, or the right complaint."""
        answer = self.answer(case)
        if case in REFUSALS:
            assert "error" in answer, answer
            self.check_refusal(case, answer["error"])
        else:
            assert "value" in answer, answer
            assert answer["value"], "no outputs"
            for place in answer["value"]:
                self.check_picture(place)

    def check_refusal(self, case: str, text: str) -> None:
        """The user must be told what is wrong."""
        self.check_text(self.client.mute.get(case, REFUSALS[case]), text)

    @staticmethod
    def check_text(wanted: str, text: str) -> None:
        """``wanted``, a pattern, must be found, over lines too."""
        assert re.search(wanted, text, re.DOTALL), text

    def check_picture(self, place: str) -> None:
        """The picture at a URL or path must be the one that a plain request makes."""
        if self.proxy:
            assert place.startswith((f"https://{HOST}/files/", "/")), place
            place = place.replace(f"https://{HOST}", self.live.base_url)
        image = open_picture(place)
        assert image.size == SIZE
        assert image.tobytes() == self.reference.pixels(self.body)


class Reference:
    """What plain requests make at the live server; each is sent once."""

    def __init__(self, live: LiveServer) -> None:
        self.live = live
        self._pixels: dict[str, bytes] = {}

    def pixels(self, wanted: Mapping[str, Any]) -> bytes:
        """The first picture's pixels."""
        name = repr(sorted(wanted.items()))
        if name not in self._pixels:
            ended = self.live.run(wanted, timeout_s=120)
            assert ended["status"] == "completed", ended
            image = download(ended["outputs"][0])
            assert len(image.getcolors(image.width * image.height) or []) > 100, "one colour"
            self._pixels[name] = image.tobytes()
        return self._pixels[name]


def body(image: str) -> dict[str, Any]:
    """Parameters of a small picture."""
    return {"image": image, "size": "512*512", "seed": 7, "num_inference_steps": STEPS}


def open_picture(place: str) -> Image.Image:
    """The picture at a URL, fetched without a key, or in a file."""
    if place.startswith("http"):
        return download(place)
    image = Image.open(BytesIO(Path(place).read_bytes()))
    image.load()
    return image
