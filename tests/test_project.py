"""Guards for the project itself: layout, packaging, pins, house limits, the container file.

Nothing here needs a GPU, a network or a container engine.
"""

import ast
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from threaded import answering

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("server/redux_server", "pipelines/redux_pipelines",
            "kernels/redux_kernels", "weights/redux_weights")  # fmt: skip
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

MAX_FILE_LINES = 500  # a longer one says in its docstring why it is one file
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 100
MAX_TRACKED_BYTES = 2_000_000
LARGE_FILES = re.compile(r"weights/.*\.safetensors")  # the embedded model


def run(*command: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command with our four packages importable, installed or not."""
    paths = os.pathsep.join(str((ROOT / package).parent) for package in PACKAGES)
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def files_of_project() -> list[Path]:
    """What git tracks, and what it would track: not what it ignores."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = run("git", "ls-files", "-co", "--exclude-standard", "-z")
    assert listed.returncode == 0, listed.stderr
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def sources() -> Iterator[Path]:
    """Every Python file of the four packages."""
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


# --- layout ---------------------------------------------------------------------------------------


def test_no_folder_shadows_the_hugging_face_kernels_library() -> None:
    for folder in ("server", "pipelines", "kernels", "weights"):
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/ must not be a package"
    assert not list((ROOT / "tests").rglob("__init__.py")), "tests/ holds no packages"


def test_import_kernels_is_not_ours_even_from_the_repository_root() -> None:
    code = """
import importlib.util, sys
sys.path[:0] = ["", "tests"]
spec = importlib.util.find_spec("kernels")
print("none" if spec is None or spec.loader is None else spec.origin)
from diffusers.utils.import_utils import is_kernels_available as seen_by_diffusers
from transformers.utils.import_utils import is_kernels_available as seen_by_transformers
print(seen_by_diffusers(), seen_by_transformers())
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    origin, seen = done.stdout.splitlines()
    assert not origin.startswith((str(ROOT / "kernels"), str(ROOT / "tests")))
    assert origin != "none" or seen == "False False"


def test_imports_go_one_way() -> None:
    done = run(sys.executable, "-c", "import sys; from importlinter.cli import lint_imports; "
               "sys.exit(lint_imports(cache_dir=None, no_cache=True))")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_and_functions_stay_within_the_house_limits() -> None:
    too_long = []
    for path in sources():
        text = path.read_text()
        name = path.relative_to(ROOT)
        tree = ast.parse(text)
        has_reason = "one file" in (ast.get_docstring(tree) or "").lower()
        if (lines := text.count("\n")) > MAX_FILE_LINES and not has_reason:
            too_long.append(f"{name}: {lines} lines, at most {MAX_FILE_LINES} without a reason")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                is_kernel = any("jit" in ast.unparse(each) for each in node.decorator_list)
                limit = MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > limit:
                    too_long.append(
                        f"{name}:{node.lineno} {node.name}: {lines} lines, at most {limit}"
                    )
    assert not too_long, "\n".join(too_long)


def test_no_large_file_is_tracked() -> None:
    large = {
        str(path.relative_to(ROOT)): path.stat().st_size
        for path in files_of_project()
        if path.stat().st_size >= MAX_TRACKED_BYTES
    }
    assert not [name for name in large if not LARGE_FILES.fullmatch(name)], large


# --- packaging ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names inside the wheel, built as a user's pip would build it."""
    out = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out))
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return archive.namelist()


def test_wheel_holds_every_source_and_data_file_of_the_packages(wheel: list[str]) -> None:
    folders = {(ROOT / package): Path(package).name for package in PACKAGES}
    expected = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for path in files_of_project()
        for folder, name in folders.items()
        if path.is_relative_to(folder)
    }
    assert not expected - set(wheel)
    assert {f"{name}/py.typed" for name in folders.values()} <= set(wheel)
    assert "redux_server/static/sample.jpg" in wheel


def test_wheel_holds_the_embedded_model(wheel: list[str]) -> None:
    mini = ROOT / "weights/mini"
    expected = {
        f"redux_weights/mini/{path.relative_to(mini).as_posix()}"
        for path in files_of_project()
        if path.is_relative_to(mini / "base") or path.is_relative_to(mini / "redux")
    }
    found = {name for name in wheel if name.startswith("redux_weights/mini/")}
    assert found == expected
    assert "redux_weights/mini/base/transformer/diffusion_pytorch_model.safetensors" in found


def test_embedded_model_is_at_most_40_mb() -> None:
    sizes = [
        path.stat().st_size
        for path in files_of_project()
        if path.is_relative_to(ROOT / "weights/mini")
    ]
    assert sum(sizes) <= 40_000_000


def test_wheel_holds_nothing_else(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel if ".dist-info/" not in name}
    assert tops == {Path(package).name for package in PACKAGES}
    assert not [name for name in wheel if re.search(r"(^|/)(tests?|benchmarks)/|\.pyc$", name)]
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)


@pytest.mark.parametrize(
    ("name", "kind", "licence"),
    [("sample.jpg", "JPEG", "CC0"), ("sample-icon.png", "PNG", "Apache-2.0")],
)
def test_bundled_pictures_are_small_and_their_licences_are_told(
    name: str, kind: str, licence: str
) -> None:
    folder = ROOT / "server/redux_server/static"
    assert (folder / name).stat().st_size <= 150_000
    with Image.open(folder / name) as image:
        image.load()
        assert (image.format, image.mode) == (kind, "RGB")
    told = (folder / "README.md").read_text()
    assert f"`{name}`" in told
    assert licence in told


def pins(name: str = "constraints.txt") -> dict[str, Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(each.name): each for each in found}


def test_constraints_pin_every_direct_dependency_to_an_allowed_version() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    direct = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    pinned = pins()
    for wanted in map(Requirement, direct + [each for extra in extras for each in extra]):
        pin = pinned.get(canonicalize_name(wanted.name))
        assert pin is not None, f"constraints.txt does not pin {wanted.name}"
        (version,) = [spec.version for spec in pin.specifier]
        assert wanted.specifier.contains(version), f"{pin} is outside {wanted}"


def test_the_oldest_torch_and_triton_that_are_allowed_are_those_tested() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    direct = [*PROJECT["project"]["dependencies"], *(each for extra in extras for each in extra)]
    allowed = {wanted.name: wanted.specifier for wanted in map(Requirement, direct)}
    oldest = pins("constraints-oldest.txt")
    assert oldest.keys() <= pins().keys()
    versions = {name: next(iter(pin.specifier)).version for name, pin in oldest.items()}
    for name in ("torch", "triton"):
        (least,) = [each.version for each in allowed[name] if each.operator == ">="]
        assert versions[name] == f"{least}.0"
    for name in versions.keys() & allowed.keys():
        assert allowed[name].contains(versions[name]), name


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_constraints_are_exact_and_name_no_build_and_no_place(name: str) -> None:
    for pin in pins(name).values():
        (spec,) = pin.specifier
        assert spec.operator == "==" and "*" not in spec.version, pin
        assert "+" not in spec.version, f"{pin}: a local version exists on one index only"
        assert pin.url is None, pin


def test_changelog_tells_of_this_version_or_of_unreleased_changes() -> None:
    code = (ROOT / "server/redux_server/__init__.py").read_text()
    version = re.search(r'__version__ = "(.+)"', code)
    assert version
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert {"Unreleased", version[1]} & set(headings)


def test_decision_records_are_numbered_and_short() -> None:
    folder = ROOT / "docs/internals/decisions"
    records = sorted(set(folder.glob("*.md")) - {folder / "index.md"})
    assert [path.name[:4] for path in records] == [f"{i:04}" for i in range(1, len(records) + 1)]
    for path in records:
        text = path.read_text()
        assert text.startswith(f"# {path.name[:4]}: ")
        assert re.findall(r"^## (.+)", text, re.MULTILINE) == ["Context", "Decision", "Price"]
        assert len(text.splitlines()) <= 40, path.name


def test_decision_records_are_listed_with_their_titles() -> None:
    folder = ROOT / "docs/internals/decisions"
    listed = re.findall(r"^\* \[(.+)\]\((.+)\)$", (folder / "index.md").read_text(), re.MULTILINE)
    titles = [
        (path.read_text().split("\n")[0].removeprefix("# "), path.name)
        for path in sorted(folder.glob("[0-9]*.md"))
    ]
    assert listed == titles


def test_make_help_lists_every_task() -> None:
    if shutil.which("make") is None:
        pytest.skip("no make")
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    phony = re.findall(r"^\.PHONY: (.+)$", text, re.MULTILINE)[0].split()
    shown = run("make", "help").stdout
    assert [task for task in phony if not re.search(rf"\b{task}\b", shown)] == []


def test_ci_script_can_be_run() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert run("bash", "-n", str(ROOT / ".ci/run")).returncode == 0


# --- the Pythons ----------------------------------------------------------------------------------

STUB = """#!/bin/sh
case "$*" in
  --version) echo "Python 3.{minor}.0" ;;
  *version_info?:2*) echo python3.{minor} ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && ln -s /bin/true "$3/bin/pip" ;;
  "-m pytest "*) echo "tests of $0" && exit {status} ;;
esac
"""  # an interpreter that does what the Makefile asks of one, and whose tests exit with a status


@pytest.fixture
def pythons(tmp_path: Path) -> Path:
    """A folder with nothing but the Makefile and what it installs from; stubs go to its bin/."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "constraints-oldest.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    return tmp_path


def add_python(folder: Path, minor: int, *, status: int = 0, name: str = "") -> None:
    stub = folder / "bin" / (name or f"python3.{minor}")
    stub.write_text(STUB.format(minor=minor, status=status))
    stub.chmod(0o755)


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make without the flags and variables of a make that runs these tests."""
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    return run("env", "-i", f"PATH={path}", "make", *arguments, cwd=folder)


def variable(folder: Path, name: str) -> list[str]:
    return make(folder, "--eval", f"show: ; @echo $({name})", "show").stdout.split()


def test_classifiers_and_makefile_name_the_same_pythons(pythons: Path) -> None:
    start = "Programming Language :: Python :: "
    classified = [each for each in PROJECT["project"]["classifiers"] if each.startswith(start)]
    tested = variable(pythons, "TESTED")
    assert sorted(tested) == sorted(f"python{each.removeprefix(start)}" for each in classified)
    assert variable(pythons, "PYTHON") == [*tested, "python3"]


@pytest.mark.parametrize(("status", "result"), [(0, "passed"), (1, "failed")])
def test_every_tested_python_that_is_found_runs_the_quick_tests(
    pythons: Path, status: int, result: str
) -> None:
    add_python(pythons, 97, status=status)
    add_python(pythons, 98)
    done = make(pythons, "test-pythons", "TESTED=python3.97 python3.98 python3.99")
    for minor in (97, 98):
        assert f"tests of .venv-3.{minor}/bin/python" in done.stdout
    summary = {
        "passed": "passed: python3.97 python3.98; failed: none; not found: python3.99",
        "failed": "passed: python3.98; failed: python3.97; not found: python3.99",
    }
    assert done.stdout.splitlines()[-1] == summary[result]
    assert (done.returncode == 0) is (result == "passed")


def test_the_oldest_torch_is_tested_in_an_environment_of_its_own(pythons: Path) -> None:
    add_python(pythons, 97)
    add_python(pythons, 98)
    done = make(pythons, "test-oldest", "TESTED=python3.98 python3.97")
    assert "tests of .venv-oldest/bin/python" in done.stdout
    assert "with Python 3.97.0" in done.stdout
    written = (pythons / ".venv-oldest/constraints.txt").read_text().splitlines()
    exact = [line for line in written if line and not line.startswith("#")]
    expected = {**pins(), **pins("constraints-oldest.txt")}
    assert {
        canonicalize_name(Requirement(line).name): Requirement(line) for line in exact
    } == expected
    assert len(exact) == len(expected)


def test_no_tested_python_at_all_is_a_failure(pythons: Path) -> None:
    done = make(pythons, "test-pythons", "TESTED=python3.98 python3.99")
    assert "not found: python3.98 python3.99" in done.stdout
    assert done.returncode != 0


def test_tested_python_is_preferred_and_an_untested_one_is_told(pythons: Path) -> None:
    tested = "TESTED=python3.97 python3.98"
    add_python(pythons, 99, name="python3")
    untested = make(pythons, "setup", tested)
    assert "Making .venv with Python 3.99.0" in untested.stdout
    assert "tested with python3.97 python3.98, not with python3.99" in untested.stdout
    assert untested.returncode == 0

    shutil.rmtree(pythons / ".venv")
    add_python(pythons, 98)
    preferred = make(pythons, "setup", tested)
    assert "Making .venv with Python 3.98.0" in preferred.stdout
    assert "tested with" not in preferred.stdout


# --- container ------------------------------------------------------------------------------------

Stage = list[tuple[str, str]]


@pytest.fixture(scope="module")
def stages() -> list[Stage]:
    """The Dockerfile's stages, each a list of (INSTRUCTION, arguments)."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: list[Stage] = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if line.strip():
            word, rest = line.strip().split(None, 1)
            if word.upper() == "FROM":
                found.append([])
            found[-1].append((word.upper(), " ".join(rest.split())))
    return found


def the(stage: Stage, word: str) -> str:
    """The arguments of the last ``word`` in a stage."""
    return [rest for name, rest in stage if name == word][-1]


def environment(stage: Stage) -> dict[str, str]:
    pairs = [pair for name, rest in stage if name == "ENV" for pair in rest.split()]
    return dict(pair.split("=", 1) for pair in pairs)


def test_image_runs_as_an_unprivileged_numeric_user(stages: list[Stage]) -> None:
    uid, gid = the(stages[-1], "USER").split(":")
    assert int(uid) >= 1000
    assert int(gid) >= 1000
    words = [name for name, _ in stages[-1]]
    assert "RUN" not in words[words.index("USER") :], "a step after USER would lack its rights"


def test_image_copies_only_what_exists_and_is_not_ignored(stages: list[Stage]) -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    copies = [rest for stage in stages for name, rest in stage if name == "COPY"]
    named = [source for rest in copies if "--from" not in rest for source in rest.split()[:-1]]
    assert {Path(source) for source in named} >= {Path(package) for package in PACKAGES}
    for source in named:
        assert (ROOT / source).exists(), f"Dockerfile copies {source}, which does not exist"
        assert f"!{source}" in ignore, f".dockerignore keeps {source} from the builder"


def test_image_installs_dependencies_before_our_code(stages: list[Stage]) -> None:
    steps = [rest for name, rest in stages[-1] if name in ("RUN", "COPY")]
    dependencies = next(i for i, rest in enumerate(steps) if "-r /tmp/build/" in rest)
    code = next(i for i, rest in enumerate(steps) if ".whl" in rest)
    assert dependencies < code
    before = " ".join(steps[:dependencies])
    assert "redux_" not in before and "pyproject" not in before, "would be rebuilt at each change"


def test_image_installs_exactly_what_the_project_needs_alone_and_in_a_cluster(
    stages: list[Stage], tmp_path: Path
) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    _python, *arguments = json.loads(the(stages[0], "RUN"))
    assert run(sys.executable, *arguments, cwd=tmp_path).returncode == 0
    listed = (tmp_path / "requirements.txt").read_text().splitlines()
    project = PROJECT["project"]
    assert listed == project["dependencies"] + project["optional-dependencies"]["cluster"]


def test_image_starts_the_server_with_settings_it_knows(stages: list[Stage]) -> None:
    from redux_server import settings
    from redux_server.cli import main

    command = json.loads(the(stages[-1], "CMD"))
    assert json.loads(the(stages[-1], "ENTRYPOINT")) == list(PROJECT["project"]["scripts"])
    main.build_parser().parse_args(command)
    main.build_parser().parse_args(["keys", "create", "--name", "me"])  # the header's example
    assert "keys create --name me" in (ROOT / "Dockerfile").read_text()
    ours = {name for name in environment(stages[-1]) if name.startswith(settings.PREFIX)}
    known = {
        settings.environment_name(name)
        for each in settings.SETTINGS_CLASSES
        for name in each.__dataclass_fields__
    }
    assert ours <= known


def test_image_keeps_data_in_a_volume_and_reads_weights_from_a_mount(stages: list[Stage]) -> None:
    env = environment(stages[-1])
    assert the(stages[-1], "VOLUME") == env["FLUX_REDUX_DATA_DIR"] == "/data"
    assert env["HF_HOME"] == "/weights/hf"
    assert the(stages[-1], "EXPOSE") == "8000"


@contextmanager
def server_answering(status: int) -> Iterator[tuple[int, list[str]]]:
    """A loopback server that gives every GET the same status; yields its port and the paths."""
    paths: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with answering(http.server.HTTPServer(("127.0.0.1", 0), Handler)) as server:
        yield server.server_port, paths


@pytest.mark.parametrize(("status", "is_healthy"), [(200, True), (503, False)])
@pytest.mark.parametrize("role", ["FLUX_REDUX_PORT", "FLUX_REDUX_METRICS_PORT"])
def test_image_health_check_asks_livez_of_a_server_or_of_a_worker(
    stages: list[Stage], role: str, status: int, is_healthy: bool
) -> None:
    options, command = the(stages[-1], "HEALTHCHECK").split("CMD ")
    assert "--start-period=" in options
    assert environment(stages[-1])["FLUX_REDUX_METRICS_PORT"] == "8001"
    _python, *arguments = json.loads(command)
    ports = {"FLUX_REDUX_PORT": "9", "FLUX_REDUX_METRICS_PORT": "9"}  # where nobody listens
    with server_answering(status) as (port, paths):
        ports[role] = str(port)
        done = run(sys.executable, *arguments, **ports, NO_PROXY="*")
    assert paths == ["/livez"]
    assert (done.returncode == 0) is is_healthy
    assert done.stderr == ""
