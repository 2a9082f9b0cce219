"""``flux-redux weights``: quantize. Finds the base, shows progress, says what was made."""

from contextlib import closing
from pathlib import Path

from redux_pipelines.errors import ReduxError
from redux_pipelines.loading import locate
from redux_server.cli import UsageError
from redux_server.client import note
from redux_server.progress import ProgressReport
from redux_server.settings import ModelSettings
from redux_weights.layout import BASE_FILES

_MEBIBYTE = 2**20


def quantize(settings: ModelSettings, out: str) -> int:
    """Write ``--base`` with its transformer in fp8 to the new folder ``out``; the exit code.

    Raises:
        UsageError: no base was named.
    """
    if not settings.base:
        raise UsageError("weights quantize needs --base: a diffusers folder or a Hub repository")
    from redux_pipelines.fp8_export import quantize_checkpoint

    target = Path(out).expanduser().absolute()
    try:
        base = locate(
            settings.base, BASE_FILES, option="--base", revision=settings.revision or None
        )
        with closing(ProgressReport()) as progress:
            made = quantize_checkpoint(
                base,
                target,
                report=lambda done, total: progress.show(
                    "MiB written", done // _MEBIBYTE, total // _MEBIBYTE
                ),
            )
    except ReduxError as error:
        note(str(error))
        return 1
    note(
        f"the transformer's {made.before_bytes / 1e6:,.1f} MB are now "
        f"{made.after_bytes / 1e6:,.1f} MB; of the other files {made.linked} are hard links and "
        f"{made.copied} copies. The base's licence holds for the new weights too: that of FLUX.1 "
        "[dev] is non-commercial"
    )
    print(target)
    return 0
