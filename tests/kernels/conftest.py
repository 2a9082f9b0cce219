"""Where a kernel's tests run.

``interpreted`` tests run kernels in Triton's interpreter, which must be chosen before a kernel is
decorated, and which nothing that compiles can share a process with. So a plain run deselects them,
and ``test_interpreted.py`` runs them in a process of its own. To run one file's by hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_adaln.py

``gpu`` tests run the same cases on a device and are skipped without one.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from redux_kernels.compiler import HAS_TRITON

HERE = Path(__file__).parent
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

sys.path.append(str(HERE))  # not a package: it would shadow Hugging Face's `kernels`

if not HAS_TRITON:
    collect_ignore = ["test_interpreted.py", "test_offline_compile.py"]

if IS_INTERPRETED:
    import interpreter_memory
    import kernel_interpreter

    kernel_interpreter.install()
    interpreter_memory.install()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreted: runs kernels under TRITON_INTERPRET=1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    for item in ours:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
    wrong = {
        item for item in ours if bool(item.get_closest_marker("interpreted")) != IS_INTERPRETED
    }
    if wrong:
        config.hook.pytest_deselected(items=[item for item in items if item in wrong])
        items[:] = [item for item in items if item not in wrong]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, which stall each other on shared cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
