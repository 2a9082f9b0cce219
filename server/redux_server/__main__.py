"""Entry point of the ``flux-redux`` command and of ``python -m redux_server``."""

import sys

from redux_server.cli.main import run


def main() -> int:
    """Run the command line; the result is the process's exit code."""
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
