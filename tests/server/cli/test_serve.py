"""``serve``: what it refuses before it starts, and what it never loads."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from redux_server.cli.serve import check
from redux_server.settings import ServerSettings, UsageError


def test_serve_refuses_a_tier_that_its_backend_lacks(tmp_path: Path) -> None:
    given = ServerSettings(data_dir=tmp_path, quality="fast")
    check(given)
    with pytest.raises(UsageError, match="--quality fast needs --backend engine; diffusers has"):
        check(replace(given, backend="diffusers"))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model": "fake"}, "--parallel needs a network to share out; fake has none"),
        ({"backend": "diffusers"}, "--parallel needs --backend engine, got 'diffusers'"),
        ({"memory": "evict"}, "--memory is resident then, or auto, not evict"),
        ({"memory": "offload"}, "--memory is resident then, or auto, not offload"),
        ({"compile": "blocks"}, "--parallel goes with neither --compile nor --cuda-graphs"),
        ({"cuda_graphs": 2}, "--parallel goes with neither --compile nor --cuda-graphs"),
        ({"device": "cuda:0,cuda:1,cuda:2"}, "--parallel 2 needs 2 GPUs for each worker"),
    ],
)
def test_serve_refuses_what_several_gpus_for_an_image_do_not_go_with(
    changed: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    given = ServerSettings(data_dir=tmp_path, device="cpu", parallel=2)
    check(given)
    check(replace(given, parallel=1, memory="offload"))
    with pytest.raises(UsageError, match=reason):
        check(replace(given, **changed))


def test_what_serve_imports_is_not_torch() -> None:
    code = "import sys, redux_server.cli.serve; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
