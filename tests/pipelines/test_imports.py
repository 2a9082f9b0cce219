"""What a torch-free caller may import."""

import subprocess
import sys

HEAVY = ("torch", "diffusers", "transformers", "onnxruntime")
MODULES = (
    *("contract.types", "contract.validation", "contract.batching", "jobs", "errors", "fake"),
    *("images.rgb", "images.files", "images.safety", "loading.load", "denoising.quality"),
    *("memory.plan", "memory.activations", "memory.model_sizes", "memory.cards", "memory.malloc"),
)


IMPORT = """
import importlib, sys
sys.path[:0], modules, heavy = {path!r}, {modules!r}, {heavy!r}
for module in modules:
    importlib.import_module("redux_pipelines." + module)
    found = [name for name in heavy if name in sys.modules]
    if found:
        sys.exit(module + " imports " + ", ".join(found))
"""


def imports(modules, heavy):
    """What a process says of the first of ``modules`` that imports anything ``heavy``."""
    code = IMPORT.format(path=sys.path, modules=modules, heavy=heavy)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stderr.strip()


def test_modules_import_nothing_heavy():
    assert imports(MODULES, HEAVY) == ""


def test_a_process_that_follows_does_not_load_torchs_compiler():
    """Which takes as long as torch itself, on each of several GPUs."""
    assert imports(["denoising.parallel"], ["torch._dynamo", "diffusers"]) == ""


def test_the_safety_checker_runs_without_torch():
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; from redux_pipelines.images.safety import *; "
        "OpenNsfwChecker(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
