"""``flux-redux doctor``: what this machine has, and what ``serve`` would lack on it.

Looks only: downloads, creates and repairs nothing. Each check stands alone, and one that breaks
becomes a line of the report.
"""

from collections.abc import Callable, Iterator

from redux_server.cli.doctor.findings import Finding, Level
from redux_server.cli.doctor.gpu import (
    check_attention,
    check_card,
    check_fp8,
    check_gpu,
    check_memory,
)
from redux_server.cli.doctor.host import (
    check_api_keys,
    check_cluster,
    check_confinement,
    check_data_dir,
    check_packages,
    check_pictures,
    check_port,
    check_python,
    check_sweeps,
)
from redux_server.cli.doctor.model import (
    check_compile,
    check_compiler,
    check_model,
    check_safety_checker,
)
from redux_server.settings import ServerSettings, UsageError

_LARGEST_CARD_GB = 1000
Check = Callable[[ServerSettings], Iterator[Finding]]


def doctor(settings: ServerSettings, *, gpu_memory_gb: float = 0.0) -> int:
    """Print the report; 1 when something is missing that ``serve`` needs.

    ``gpu_memory_gb``, unless 0: say also what a card sold with so many GB would hold.

    Raises:
        UsageError: no card has as much.
    """
    if not 0 <= gpu_memory_gb <= _LARGEST_CARD_GB:
        raise UsageError(f"--gpu-memory must be 0 to {_LARGEST_CARD_GB}, got {gpu_memory_gb:g}")
    findings = [finding for examine in CHECKS for finding in _examine(examine, settings)]
    if gpu_memory_gb:
        findings += check_card(settings, gpu_memory_gb)
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        text = finding.text.replace("\n", "\n" + " " * (width + 11))
        print(f"{finding.level:<7}  {finding.subject:<{width}}  {text}")
    missing = sum(finding.level is Level.MISSING for finding in findings)
    print(
        f"\n{missing} missing" if missing else "\nNothing is missing: `flux-redux serve` can run."
    )
    return 1 if missing else 0


def _examine(examine: Check, settings: ServerSettings) -> Iterator[Finding]:
    subject = examine.__name__.removeprefix("check_").replace("_", " ")
    try:
        yield from examine(settings)
    except Exception as error:
        yield Finding(Level.NOTE, subject, f"cannot be examined: {type(error).__name__}: {error}")


CHECKS: tuple[Check, ...] = (
    check_python,
    check_packages,
    check_gpu,
    check_memory,
    check_attention,
    check_fp8,
    check_compiler,
    check_compile,
    check_model,
    check_safety_checker,
    check_data_dir,
    check_confinement,
    check_pictures,
    check_cluster,
    check_sweeps,
    check_port,
    check_api_keys,
)
