"""Lets the processes of one server share their counters, through files in a temporary folder.

Kept apart from ``redux_server.metrics``: prometheus_client decides when it is first imported
whether values live in memory or in files, so this has to run before.
"""

import atexit
import os
import shutil
import sys
import tempfile

_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def share_metrics() -> None:
    """Make the folder and name it in the environment, where child processes find it."""
    assert "prometheus_client" not in sys.modules, "too late: metrics are already in memory"
    if _VARIABLE in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="flux-redux-metrics-")
    os.environ[_VARIABLE] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
