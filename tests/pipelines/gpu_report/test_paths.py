"""The bundle's wheels are found after all that is installed, and by processes of their own."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from gpu_report import paths

BENCHMARKS = paths.ROOT / "pipelines/benchmarks"


@pytest.fixture
def bundle(tmp_path):
    """Two wheels: one of something that is nowhere else, one of something that is installed."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name, text in (("only_in_the_bundle", "HERE = 1"), ("packaging", "HERE = 1")):
        with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", text)
    return folder


def test_what_is_installed_comes_first_and_the_project_before_it(bundle, tmp_path):
    code = (
        "from gpu_report import paths; from pathlib import Path; import sys;"
        "paths.set_up(Path(sys.argv[1]));"
        "import only_in_the_bundle, packaging, redux_pipelines, timing;"
        "print(only_in_the_bundle.__file__, hasattr(packaging, 'HERE'), redux_pipelines.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle)],
        env={"PYTHONPATH": str(BENCHMARKS), "TMPDIR": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    found, is_shadowed, project = done.stdout.split()
    assert Path(found).is_relative_to(tmp_path)
    assert is_shadowed == "False"
    assert Path(project).is_relative_to(paths.ROOT / "pipelines")


def test_wheels_are_unpacked_once(bundle, tmp_path):
    wheels = sorted(bundle.glob("*.whl"))
    first = paths.unpacked(wheels, tmp_path)
    (first / "kept").touch()
    assert paths.unpacked(wheels, tmp_path) == first
    assert (first / "kept").exists()
    assert paths.unpacked(wheels[:1], tmp_path) != first
    assert [path for path in tmp_path.iterdir() if path.name.startswith(f"{first.name}-")] == []


def test_a_launched_module_gets_its_arguments_and_finds_the_project(tmp_path):
    (tmp_path / "said.py").write_text(
        "import sys, redux_kernels, gpu_report\nprint(__name__, sys.argv[1:])\n"
    )
    launch = BENCHMARKS / "gpu_report/launch.py"
    done = subprocess.run(
        [sys.executable, str(launch), "said", "-m", "gpu"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "__main__ ['-m', 'gpu']"
