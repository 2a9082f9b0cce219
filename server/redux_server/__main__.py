"""Entry point of the ``flux-redux`` command and of ``python -m redux_server``."""

import os
import sys

from redux_server.cli.main import run


def main() -> int:
    """Run the command line; the result is the process's exit code.

    OpenMP's idle threads are told to sleep, whichever verb computes. Left to themselves they spin,
    and beside other work they take the cores from those that compute. OpenMP reads the variable
    when torch loads it, so it is set before any verb is imported; who has set it is left alone.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
