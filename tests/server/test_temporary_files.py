"""No part of a server keeps anything in the system's own temporary folder.

That one may be full, read-only or swept while the server runs. Code is read for what would use it
without a word, and a live server and its worker are asked where they keep what is temporary.
"""

import ast
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from e2e.live import ROOT, LiveServer, data_uri, wait_until
from redux_server.api.bodies import SMALL_BYTES
from server.full_disk import fill

PACKAGES = ("server/redux_server", "pipelines/redux_pipelines")
# What a process in the data directory's own folder (`use_temporary_folder`) may use as it is, or
# what no server runs.
DEFAULT_ALLOWED = {
    "server/redux_server/cli/demo.py": "a server of its own with all its data",
    "pipelines/redux_pipelines/loading/load.py": "a worker's TMPDIR is in the data directory",
    "pipelines/redux_pipelines/loading/parallel.py": "a worker's TMPDIR is in the data directory",
}
MAKERS = {
    *("TemporaryFile", "NamedTemporaryFile", "SpooledTemporaryFile", "TemporaryDirectory"),
    *("mkdtemp", "mkstemp", "mktemp", "gettempdir", "gettempdirb"),
}
# Starlette spools the files of forms wherever tempfile says.
FORMS = {"form", "UploadFile", "Form", "File", "FormParser", "MultiPartParser"}


def implicit_uses(text: str) -> Iterator[str]:
    """What in a module's ``text`` would end up in the default temporary folder."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("starlette.form"):
            yield f"line {node.lineno}: starlette's form parser"
        if not isinstance(node, ast.Call):
            if isinstance(node, ast.Constant) and str(node.value).startswith(("/tmp", "/var/tmp")):
                yield f"line {node.lineno}: {node.value}"
            continue
        function = node.func
        name = getattr(function, "attr", getattr(function, "id", ""))
        if name in MAKERS and not any(given.arg == "dir" for given in node.keywords):
            yield f"line {node.lineno}: {name}() without dir="
        if name in FORMS:
            yield f"line {node.lineno}: {name}()"


@pytest.mark.parametrize("package", PACKAGES)
def test_code_says_where_it_keeps_what_is_temporary(package: str) -> None:
    found = {
        str(path.relative_to(ROOT)): uses
        for path in sorted((ROOT / package).rglob("*.py"))
        if (uses := list(implicit_uses(path.read_text())))
    }
    allowed = {name for name in DEFAULT_ALLOWED if name.startswith(package)}
    assert set(found) == allowed, {name: found[name] for name in set(found) - allowed}


@pytest.mark.parametrize(
    "text",
    [
        "tempfile.TemporaryFile()",
        "SpooledTemporaryFile(max_size=9)",
        "mkdtemp(prefix='x')",
        "open('/tmp/x')",
        "form = await request.form()",
        "def upload(file=File()): ...",
        "from starlette.formparsers import FormParser",
    ],
)
def test_code_that_does_not_would_be_seen(text: str) -> None:
    assert list(implicit_uses(f"async def used(request):\n    {text}\n"))


def environment_of(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def temporary_files_of(pid: int) -> set[Path]:
    """Files without a name, and the locks of folders, that a process has open."""
    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    return {Path(link) for link in links if link.endswith("/.lock")}


def test_a_server_and_its_worker_keep_it_in_the_data_directory(live: LiveServer) -> None:
    place = live.data_dir / "tmp"
    (worker,) = live.worker_pids()
    assert Path(environment_of(worker)["TMPDIR"]).parent == place
    folders = {path.parent for pid in (live.pid, worker) for path in temporary_files_of(pid)}
    assert len(folders) == 2
    assert {folder.parent for folder in folders} == {place}


def test_a_server_needs_no_temporary_folder_of_the_systems(tmp_path: Path) -> None:
    """As in a container with a read-only root, or where the folder was lost after the start."""
    code = (
        "import tempfile; tempfile._candidate_tempdir_list = lambda: ['/proc/nowhere']; "
        "from redux_server.cli import main, serve; "
        "serve.serve = lambda _: print(tempfile.TemporaryFile() and tempfile.gettempdir()) or 0; "
        "import sys; sys.exit(main.run(sys.argv[1:]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
    command = [sys.executable, "-c", code, "serve", "--data-dir", str(tmp_path / "data")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == tmp_path / "data" / "tmp"


def test_a_data_directory_without_room_is_said_in_one_line(small_disk: Path) -> None:
    fill(small_disk)
    command = [sys.executable, "-m", "redux_server", "serve", "--model", "fake", "--port", "0"]
    command += ["--data-dir", str(small_disk / "data")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert str(small_disk / "data") in line
    assert "full" in line or "No space left" in line


def test_a_server_whose_folder_is_lost_goes_on_and_its_worker_starts_again(tmp_path: Path) -> None:
    """A picture of megabytes needs the folder on its way in; a worker at its start."""
    noise, buffer = Image.effect_noise((1200, 900), 90), io.BytesIO()
    noise.save(buffer, "PNG")
    large = data_uri(buffer.getvalue())
    assert len(large) > SMALL_BYTES
    with LiveServer(tmp_path / "data") as server:
        subprocess.run(["rm", "-r", str(server.data_dir / "tmp")], check=True)
        body = {"image": large, "size": "512*512", "num_inference_steps": 1}
        assert server.run(body)["status"] == "completed"
        subprocess.run(["rm", "-r", str(server.data_dir / "tmp")], check=True)
        (worker,) = server.worker_pids()
        os.kill(worker, 9)
        wait_until(lambda: worker not in server.worker_pids(), 10)
        assert server.run(body)["status"] == "completed"
