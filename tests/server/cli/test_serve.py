"""``serve``: what it refuses before it starts, and what it never loads."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from redux_server.cli.serve import check
from redux_server.settings import ServerSettings, UsageError


def test_serve_refuses_a_tier_that_its_backend_lacks(tmp_path: Path) -> None:
    given = ServerSettings(data_dir=tmp_path, quality="fast")
    check(given)
    with pytest.raises(UsageError, match="--quality fast needs --backend engine; diffusers has"):
        check(replace(given, backend="diffusers"))


def test_what_serve_imports_is_not_torch() -> None:
    code = "import sys, redux_server.cli.serve; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
