"""``python pipelines/benchmarks/gpu_report``: finds the project's packages, and starts."""

import sys
import time
from pathlib import Path

STARTED = time.time()  # before minutes of imports on a cold disk

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    # as a script this folder comes first, and its modules are not to be found by their bare names
    sys.path[:] = [each for each in sys.path if Path(each or ".").resolve() != here]
    sys.path.insert(0, str(here.parent))

    from gpu_report import paths

    paths.set_up()

    try:
        from gpu_report.cli import main
    except ModuleNotFoundError as missing:
        sys.exit(
            f"{missing}: the report needs torch, triton, diffusers, transformers, pillow, numpy; "
            "make setup installs them, and make gpu-bundle gathers what a machine offline lacks"
        )
    sys.exit(main(sys.argv[1:], started=STARTED))
