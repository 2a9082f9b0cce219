"""Verbs and flags: what is understood, refused, and said in how many lines."""

import errno
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from redux_server import __version__
from redux_server.cli import main
from redux_server.cli.main import EXIT_CLOSED_PIPE, EXIT_USAGE, Verb, build_parser, run
from redux_server.settings import GROUPS

VERBS = (
    ["serve"],
    ["worker"],
    ["generate"],
    ["warmup"],
    ["submit"],
    ["cancel"],
    ["demo"],
    ["keys"],
    ["keys", "create"],
    ["keys", "list"],
    ["keys", "revoke"],
    ["db"],
    ["db", "current"],
    ["db", "upgrade"],
    ["tasks"],
    ["tasks", "unbind"],
    ["weights"],
    ["weights", "quantize"],
    ["bench"],
    ["bench", "compare"],
    ["version"],
    ["doctor"],
)
# A call of each verb, with what it cannot do without.
CALLS = {
    "generate": ["a.png"],
    "submit": ["a.png"],
    "cancel": ["id"],
    "keys create": ["--name", "me"],
    "keys revoke": ["id"],
    "uploads delete": ["id"],
    "weights quantize": ["--out", "x"],
    "bench compare": ["a.json", "b.json"],
}
NO_PARAMETERS = ("image", "images", "mask", "out", "wait", "as_json")


def called(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> tuple[Any, dict[str, Any]]:
    """The settings and the keywords with which ``arguments`` have their verb's function called."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def note(settings: Any = None, **given: Any) -> int:
        calls.append((settings, given))
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(Verb, "load", lambda _: note)
        patch.setattr(main, "_use_temporary_folder", lambda _: None)
        assert run(arguments) == 0
    (call,) = calls
    return call


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_explains_itself(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run([*verb, "--help"])
    assert left.value.code == 0
    assert f"usage: flux-redux {' '.join(verb)}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", main.VERBS, ids=lambda verb: verb.name)
def test_every_verb_has_a_function_that_takes_its_flags(
    verb: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, given = called(monkeypatch, [*verb.name.split(), *CALLS.get(verb.name, ())])
    taken = () if verb.settings is None else (settings,)
    inspect.signature(verb.load()).bind(*taken, **given)
    assert type(settings) is (verb.settings or type(None))


@pytest.mark.parametrize("verb", [["serve"], ["worker"], ["doctor"]], ids=" ".join)
def test_help_shows_settings_in_groups_and_the_ten_most_used_first(
    verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run([*verb, "--help"])
    text = capsys.readouterr().out
    sections = dict(re.findall(r"^(\S.*):\n((?:  .*\n|\n(?=  ))+)", text, re.MULTILINE))
    titles = list(sections)
    assert titles[:2] == ["options", "Most used"]
    most_used = re.findall(r"^  (--[a-z-]+)", sections["Most used"], re.MULTILINE)
    assert len(most_used) == 10
    assert {"--model", "--base", "--redux", "--host", "--port", "--data-dir"} <= set(most_used)
    assert re.findall(r"^  (--[a-z-]+)", sections["Workers"], re.MULTILINE)[0] == "--dispatch"
    others = [title for title in titles[2:] if title in GROUPS]
    assert others == [title for title in GROUPS if title not in ("Most used", "Connection")]


def test_the_line_of_usage_has_what_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, shown in (
        (["serve"], "serve [FLAGS]"),
        (["generate"], "generate IMAGE [FLAGS]"),
        (["keys", "create"], "keys create --name NAME [FLAGS]"),
    ):
        with pytest.raises(SystemExit):
            run([*verb, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: flux-redux {shown}\n")


def test_the_overview_names_each_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["--help"])
    text = capsys.readouterr().out
    for verb in VERBS:
        assert re.search(rf"^    {verb[0]} ", text, re.MULTILINE)
    assert "non-commercial" in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "the following arguments are required: VERB; see `flux-redux --help`"),
        (["serv"], "argument VERB: invalid choice: 'serv'"),
        (["serve", "--prot", "1"], "unrecognized arguments: --prot 1"),
        (["serve", "--port", "x"], "--port must be a whole number, got 'x'"),
        (["submit"], "the following arguments are required: IMAGE; see `flux-redux submit --help`"),
        (["submit", "a.png", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["weights", "quantize", "--base", "x"], "the following arguments are required: --out"),
        (
            ["weights", "quantize", "--out", "x"],
            "weights quantize needs --base: a diffusers folder",
        ),
        (["serve", "--transformer-dtype", "int4"], "must be one of auto, same, fp8, got 'int4'"),
        (["keys", "create"], "the following arguments are required: --name"),
        (
            ["keys", "create", "--name", "me", "--priority", "11"],
            "--priority must be -10 to 10, got 11",
        ),
        (["cancel"], "the following arguments are required: ID; see `flux-redux cancel --help`"),
        (["serve", "--dispatch", "redis"], "--dispatch must be one of local, sql, celery"),
        (
            ["serve", "--dispatch", "sql", "--engine", "celery"],
            "--dispatch sql and --engine celery contradict each other",
        ),
        (["doctor", "--gpu-memory", "-1"], "--gpu-memory must be 0 to 1000, got -1"),
        (["worker", "--device", "cuda:0,cuda:1"], "choose --device from cuda:0 or cuda:1"),
        (["generate", "a.png", "--size", "9x9"], "size must be"),
        (["submit", "a.png", "--quality", "best"], 'quality must be one of "exact", "balanced"'),
        (["generate", "a.png", "--quality", "best"], "--quality must be one of exact, balanced"),
        (["demo", "--num-images", "5"], "num_images must be an integer from 1 to 4; got 5."),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == EXIT_USAGE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("flux-redux: ")
    assert complaint in printed.err
    assert len(printed.err.splitlines()) == 1


def test_shortened_flags_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    # What is unique today may not be tomorrow; scripts would break.
    assert run(["submit", "a.png", "--num-im", "2"]) == EXIT_USAGE
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["version"], ["--version"]])
def test_the_version_is_the_packages(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert run(verb) == 0
    except SystemExit as left:
        assert left.code == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_an_unknown_variable_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLUX_REDUX_DATADIR", "/x")
    assert run(["keys", "list"]) == EXIT_USAGE
    assert "unknown environment variable FLUX_REDUX_DATADIR" in capsys.readouterr().err


def test_the_demo_is_small_by_default_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    given = build_parser().parse_args(["demo"])
    assert (given.size, given.num_images) == ("512*512", 2)
    given = build_parser().parse_args(["demo", "--size", "768*768", "--num-images", "1"])
    assert (given.size, given.num_images) == ("768*768", 1)
    with pytest.raises(SystemExit):
        run(["demo", "--help"])
    assert "(default: 512*512)" in capsys.readouterr().out


def test_request_flags_have_the_defaults_of_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    from redux_server.cli.submit import read_parameters
    from redux_server.parameters import PredictionRequest

    monkeypatch.setenv("FLUX_REDUX_KEY", "frs_x")
    for verb in ("submit", "generate"):
        _, given = called(monkeypatch, [verb, "a.png"])
        parameters = {k: v for k, v in given.items() if k not in NO_PARAMETERS}
        assert read_parameters(parameters) == PredictionRequest(image="picture")


def test_negative_seeds_are_values_not_flags() -> None:
    assert build_parser().parse_args(["submit", "a.png", "--seed", "-1"]).seed == -1


def test_ctrl_c_exits_as_shells_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "version", interrupted)
    assert run(["version"]) == 130


def test_listing_keys_loads_neither_torch_nor_a_web_server(tmp_path: Path) -> None:
    code = (
        "import sys; from redux_server.cli.main import run; "
        f"run(['keys', 'list', '--data-dir', {str(tmp_path)!r}]); "
        "print({'torch', 'fastapi', 'uvicorn', 'httpx', 'pydantic', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_light_verbs_load_neither_torch_nor_a_web_framework() -> None:
    code = (
        "import sys; from redux_server.cli.main import build_parser; build_parser(); "
        "print({'torch', 'fastapi', 'sqlalchemy', 'httpx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("verb", ["keys list", "db upgrade"])
def test_a_data_dir_that_cannot_be_made_is_told_in_one_line(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run([*verb.split(), "--data-dir", str(folder)]) == EXIT_USAGE
        told = capsys.readouterr().err.strip()
        assert told.startswith(f"flux-redux: cannot use {folder}: "), told
        assert "\n" not in told


@pytest.mark.parametrize(
    "verb", ["serve --model fake --port 0", "keys list", "keys create --name x", "db upgrade"]
)
@pytest.mark.parametrize(
    "folder", ["/etc/hostname", "/etc/hostname/x", "/tmp/" + "a" * 300, "/proc/x/y", "/dev/null/a"]
)
def test_place_that_cannot_be_used_is_told_in_one_line(
    verb: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*verb.split(), "--data-dir", folder]) == EXIT_USAGE
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].startswith("flux-redux: ") and folder[:7] in told[-1], told
    assert not any("Traceback" in line for line in told)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.EROFS, "Read-only file system", "/x"),
            "cannot use /x: Read-only file system",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "no permission for /x"),
        (OSError(errno.ELOOP, "Too many levels", b"/x"), "cannot use /x: Too many levels"),
        (OSError(errno.ENAMETOOLONG, "Too long", "/a\nb"), "cannot use '/a\\nb': Too long"),
        (OSError("odd"), "odd"),
        (TimeoutError(), "TimeoutError"),
    ],
    ids=str,
)
def test_fault_of_the_system_is_one_line(
    error: OSError,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(*_: object) -> int:
        raise error

    monkeypatch.setattr(main, "version", failing)
    monkeypatch.setattr(main, "_forget_output", lambda: None)
    assert run(["version"]) == EXIT_USAGE
    assert capsys.readouterr().err == f"flux-redux: {line}\n"


@pytest.mark.parametrize(
    "verb", ["version", "--help", "serve --help", "keys list", "doctor --help"]
)
def test_reader_that_closes_early_is_no_fault(verb: str, tmp_path: Path) -> None:
    run(["keys", "create", "--name", "x", "--data-dir", str(tmp_path)])
    reading, writing = os.pipe()
    os.close(reading)
    more = ["--data-dir", str(tmp_path)] if verb == "keys list" else []
    done = subprocess.run(
        [sys.executable, "-m", "redux_server", *verb.split(), *more],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert done.stderr == ""
    # argparse forgives what it cannot write itself.
    assert done.returncode in ((0, EXIT_CLOSED_PIPE) if "--help" in verb else (EXIT_CLOSED_PIPE,))


def test_full_disk_behind_the_output_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "redux_server", "version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == EXIT_USAGE
    assert done.stderr == "flux-redux: No space left on device\n"
