"""The table that make test-clients writes, and the folder it installs clients into."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clients import environments
from clients.report import BEGIN, END, Exercised, Recorder, Result, table, with_table

DOCUMENT = f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe rest.\n"


def result(case: str, outcome: str, reason: str = "", *, client: str = "npm `x`") -> Result:
    return Result(Exercised(client, "1.0", case), outcome, reason)


def test_row_tells_the_worst_of_each_case() -> None:
    rows = table(
        [result("run", "passed"), result("run", "failed"), result("upload", "passed")]
    ).splitlines()
    assert rows[0].startswith("| client | version | run | upload |")
    assert rows[2] == "| npm `x` | 1.0 | **failed** | ✓ | – | – | – | – | – |"


def test_row_tells_other_cases_and_why_one_was_skipped() -> None:
    rows = table([result("models", "passed"), result("sync", "skipped", "no | net")]).splitlines()
    assert rows[2].endswith(r"| – | – | skipped | – | – | – | models ✓; no \| net |")


def test_clients_keep_the_order_in_which_they_were_run() -> None:
    rows = table([result("run", "passed", client=name) for name in ("b", "a", "b")]).splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| b", "| a"]


def test_only_what_is_between_the_markers_changes() -> None:
    assert with_table(DOCUMENT, "new") == DOCUMENT.replace("old", "new")


INNER = """
import pytest
from clients.report import PROPERTY, Exercised

pytestmark = pytest.mark.clients

@pytest.mark.parametrize("case", ["run", "upload", "sync"])
def test_it(request, case):
    request.node.user_properties.append((PROPERTY, Exercised("npm `x`", "1.0", case)))
    if case == "sync":
        pytest.skip("no registry")
    assert case == "run"
"""


@pytest.mark.parametrize("chosen", ["", "run or upload"])
def test_whole_run_writes_its_outcomes_and_a_part_of_one_nothing(
    tmp_path: Path, chosen: str
) -> None:
    (tmp_path / "test_inner.py").write_text(INNER)
    (tmp_path / "document.md").write_text(DOCUMENT)
    source = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
    conftest = "from clients.conftest import pytest_addoption, pytest_configure\n"
    (tmp_path / "conftest.py").write_text(source + conftest)
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-k", chosen]
    report = ["--compatibility-report", str(tmp_path / "document.md")]
    command = [sys.executable, "-m", "pytest", *options, *report, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    written = (tmp_path / "document.md").read_text()
    row = "| npm `x` | 1.0 | ✓ | **failed** | skipped | – | – | – | no registry |"
    assert (written == DOCUMENT) if chosen else (row in written), written


@pytest.mark.parametrize(
    ("status", "writes"),
    [(pytest.ExitCode.OK, True), (pytest.ExitCode.TESTS_FAILED, True), (2, False), (3, False)],
)
def test_interrupted_run_writes_nothing(tmp_path: Path, status: int, writes: bool) -> None:
    place = tmp_path / "document.md"
    place.write_text(DOCUMENT)
    recorder = Recorder(str(place))
    recorder._results["one"] = Result(Exercised("npm `x`", "1.0", "run"), "passed")
    recorder.pytest_sessionfinish(status)
    assert (place.read_text() != DOCUMENT) is writes


# --- environments ---------------------------------------------------------------------------------


@pytest.fixture
def pins(tmp_path: Path) -> Path:
    """Pins of nothing: no registry is asked."""
    folder = tmp_path / "pins"
    folder.mkdir()
    (folder / "requirements.txt").write_text("# none\n")
    return folder


def test_environment_is_made_once_by_two_at_once_and_anew_for_other_pins(
    pins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    make = environments._make_python

    def counting(pins: Path, folder: Path) -> None:
        made.append(folder)
        make(pins, folder)

    monkeypatch.setattr(environments, "_make_python", counting)
    with ThreadPoolExecutor() as pool:
        work = [pool.submit(environments.install, pins, tmp_path / "cache") for _ in range(3)]
        first, second, third = [each.result() for each in work]
    assert first == second == third
    assert len(made) == 1
    (pins / "requirements.txt").write_text("# still none\n")
    assert environments.install(pins, tmp_path / "cache") != first
    assert len(made) == 2


def test_environment_that_was_not_finished_is_made_again(pins: Path, tmp_path: Path) -> None:
    made = environments.install(pins, tmp_path / "cache")
    (made.folder / ".complete").unlink()
    (made.folder / "bin/python").unlink()
    again = environments.install(pins, tmp_path / "cache")
    assert again == made
    assert subprocess.run([again.python, "-c", ""], check=True).returncode == 0


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("NewConnectionError: Failed to establish", environments.NotInstalledError),
        ("npm error code ENOTFOUND", environments.NotInstalledError),
        ("ERROR: No matching distribution found for x==9", AssertionError),
        ("npm error code ETARGET", AssertionError),
    ],
)
def test_registry_out_of_reach_is_no_failure_and_a_missing_version_is(
    tmp_path: Path, said: str, expected: type[Exception]
) -> None:
    with pytest.raises(expected):
        environments._run(["sh", "-c", f"echo '{said}' >&2; exit 1"], tmp_path)


def test_checkout_is_skipped_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIENT_SOURCES", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="names no checkout"):
        environments.checkout("client")
    (tmp_path / "client").mkdir()
    assert environments.checkout("client") == str((tmp_path / "client").resolve())


@pytest.mark.parametrize(
    ("name", "text", "version"),
    [
        ("package.json", '{"name": "x",\n  "version": "1.2.3"}', "1.2.3"),
        ("manifest.yaml", "version: 0.0.2\nmeta:\n  version: 0.0.1\n", "0.0.2"),
        ("pom.xml", "<project>\n  <version>0.2.4</version>\n</project>", "0.2.4"),
        ("README", "version 9", ""),
    ],
)
def test_checkout_says_its_version(tmp_path: Path, name: str, text: str, version: str) -> None:
    (tmp_path / name).write_text(text)
    assert environments.version_of(str(tmp_path)) == version


@pytest.mark.parametrize("folder", sorted(environments.PINS.iterdir()), ids=lambda path: path.name)
def test_pins_are_exact_and_name_no_registry(folder: Path) -> None:
    for path in folder.iterdir():
        text = path.read_text()
        assert "resolved" not in text and "index-url" not in text, path
        if path.suffix == ".txt":
            assert all(line.count("==") == 1 for line in text.splitlines()), path
    assert (folder / "requirements.txt").is_file() or (folder / "package-lock.json").is_file()
