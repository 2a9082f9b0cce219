"""``python launch.py MODULE ARGUMENTS``: run a module in a process that finds what the report does.

A path in ``PYTHONPATH`` would come before what is installed, and the bundle is to come after it.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:] = [each for each in sys.path if Path(each or ".").resolve() != here]
    sys.path.insert(0, str(here.parent))

    from gpu_report import paths

    paths.set_up()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
