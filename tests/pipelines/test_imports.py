"""What a torch-free caller may import."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "onnxruntime")
MODULES = (
    *("contract.types", "contract.validation", "contract.batching", "jobs", "errors", "fake"),
    *("images.rgb", "images.files", "images.safety", "loading.load", "denoising.quality"),
    *("memory.plan", "memory.activations", "memory.model_sizes", "memory.cards", "memory.malloc"),
)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_nothing_heavy(module):
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; import redux_pipelines.{module}; "
        f"found = [name for name in {HEAVY!r} if name in sys.modules]; sys.exit(str(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"


def test_the_safety_checker_runs_without_torch():
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; from redux_pipelines.images.safety import *; "
        "OpenNsfwChecker(); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
