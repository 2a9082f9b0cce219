"""README and docs: links, named files and commands are right, and the site loads nothing.

What the pages say of the server is held to its code in tests/server/test_documents.py.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from redux_server.cli.main import build_parser
from redux_server.settings import UsageError

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
OTHERS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "weights").rglob("README.md"))]
BY_HAND = [path for path in [*PAGES, ROOT / "README.md"] if path.parent.name != "reference"]
MAX_README_LINES = 200

_FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(([^()\s]+)\)")


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", _FENCE.sub("", text))


# --- links ----------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What links to parts of a page may name: its headings as GitHub and MkDocs write them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    plain = [re.sub(r"\[(.+?)\]\(.+?\)|`", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text).strip()) for text in plain}


def broken_links(page: Path, text: str) -> list[str]:
    """The relative links of a page that lead nowhere."""
    broken = []
    for link in _LINK.findall(without_code(text)):
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = (page.parent / parts.path).resolve() if parts.path else page
        is_there = target.exists() and target.is_relative_to(ROOT)
        if not is_there or (parts.fragment and parts.fragment not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", [*OTHERS, *PAGES], ids=names([*OTHERS, *PAGES]))
def test_relative_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text()) == []


@pytest.mark.parametrize(
    "link", ["nowhere.md", "LICENSES", "docs/index.md#nowhere", "#nowhere", "../README.md"]
)
def test_a_broken_link_would_be_seen(link: str) -> None:
    text = f"[good](LICENSE), [good](docs/index.md#where-to-read-on), `[code](x)`, [bad]({link})"
    assert broken_links(ROOT / "README.md", text) == [link]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_pages_link_to_pages_only(page: Path) -> None:
    """What is not in docs is not on the site: it is named, not linked."""
    for link in _LINK.findall(without_code(page.read_text())):
        parts = urlsplit(link)
        if not parts.scheme and parts.path:
            assert (page.parent / parts.path).resolve().is_relative_to(DOCS), link


@pytest.mark.parametrize("page", BY_HAND, ids=names(BY_HAND))
def test_files_that_are_named_exist(page: Path) -> None:
    spans = re.findall(r"`((?:tests|weights|deploy|docs)/[\w./-]+)`", page.read_text())
    assert [name for name in spans if not (ROOT / name).exists()] == []


def test_readme_fits_on_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def test_readme_lists_every_page() -> None:
    """Decision records and how they are written apart: they have a list of their own."""
    linked = set(_LINK.findall((ROOT / "README.md").read_text()))
    pages = {path for path in PAGES if not re.match(r"\d{4}-", path.name)}
    home = DOCS / "index.md"
    assert set(names(sorted(pages - {home}))) <= {link.split("#")[0] for link in linked}


# --- commands -------------------------------------------------------------------------------------


def commands(text: str) -> Iterator[str]:
    """What a page says to type after ``flux-redux``, in blocks of code and in running text.

    Where running text only names a verb, what it stands for is a look at its help.
    """
    for block in (found[0] for found in _FENCE.finditer(text)):
        lines = re.sub(r"\\\n", " ", block).splitlines()
        for line in (re.sub(r"\s+#\s.*", "", line).strip() for line in lines):
            if found := re.match(r"(?:docker run .*?flux-redux-server|flux-redux) (.+)", line):
                yield found[1]
            elif found := re.match(r'make serve ARGS="(.*)"', line):
                yield f"serve {found[1]}"
    for span in re.findall(r"`flux-redux ([^`]+)`", _FENCE.sub("", text)):
        words = span.split()
        is_name = all(re.fullmatch("[a-z]+", word) for word in words)
        yield " ".join([*words, "--help"] if is_name else words)


def complaint(command: str) -> str:
    """Why a command cannot be given; empty when it can."""
    try:
        build_parser().parse_args(shlex.split(command))
    except UsageError as error:
        return str(error)
    except SystemExit as ended:  # from --help
        return "" if ended.code == 0 else f"ends with {ended.code}"
    return ""


@pytest.mark.parametrize("page", BY_HAND, ids=names(BY_HAND))
def test_documented_commands_can_be_given(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands(page.read_text()):
        assert complaint(command) == "", command


def test_commands_are_found_and_wrong_ones_would_be_seen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = {command for page in BY_HAND for command in commands(page.read_text())}
    assert {"db upgrade", "keys create --name me", "serve --model flux-dev"} <= found
    assert len(found) >= 20
    for wrong in ("sevre", "serve --prot 1", "keys create", "cancel", "keys list --name me"):
        text = f"```\nflux-redux {wrong}   # a comment\n```"
        assert [complaint(each) for each in commands(text)] != [""], wrong


# --- the site -------------------------------------------------------------------------------------


class Loaded(HTMLParser):
    """Gathers what a browser fetches by itself when it opens a page."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self.has_diagrams = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video", "audio"):
            self.places.append(given.get("src") or "")
        elif tag == "link" and given.get("rel") != "canonical":
            self.places.append(given.get("href") or "")
        self.has_diagrams |= "mermaid" in (given.get("class") or "")  # Material fetches it


def loaded(html: str) -> Loaded:
    parser = Loaded()
    parser.feed(html)
    return parser


def elsewhere(places: list[str]) -> list[str]:
    return [place for place in places if urlsplit(place).netloc]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with every warning an error."""
    if importlib.util.find_spec("material") is None:
        pytest.skip("no MkDocs Material (extra dev)")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_site_has_every_page_and_a_search(site: Path) -> None:
    assert len(list(site.rglob("index.html"))) == len(PAGES)
    assert "requests/#parameters" in (site / "search/search_index.json").read_text()


def test_site_holds_no_code(site: Path) -> None:
    assert not list(site.rglob("*.py"))


def test_site_loads_nothing_from_other_hosts(site: Path) -> None:
    for page in site.rglob("*.html"):
        found = loaded(page.read_text())
        assert found.places, page
        assert elsewhere(found.places) == [], page
        assert not found.has_diagrams, page
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text()), style


def test_what_is_loaded_from_elsewhere_would_be_seen() -> None:
    html = '<script src="//a.example/x.js"></script><link rel=stylesheet href="https://b.example">'
    assert len(elsewhere(loaded(html).places)) == 2
    assert loaded('<pre class="mermaid">').has_diagrams
