"""The part of ``flux-redux doctor`` that looks for the model's files. Downloads nothing."""

from collections.abc import Iterator
from pathlib import Path

from redux_pipelines import loading
from redux_server.cli import UsageError
from redux_server.findings import FLUX_BYTES, Finding, Level, check_space, gigabytes
from redux_server.serve import check
from redux_server.settings import ServerSettings
from redux_weights.embedded import find_mini
from redux_weights.layout import find_missing


def check_model(settings: ServerSettings) -> Iterator[Finding]:
    """Where the model's files are, and whether they are whole."""
    try:
        check(settings)
    except UsageError as error:
        yield Finding(Level.MISSING, "settings", str(error))
        return
    named = {"flux-dev": loading.FLUX_DEV, "flux-schnell": loading.FLUX_SCHNELL}
    base = settings.base or named.get(settings.model, "")
    if not base:
        yield from _check_embedded(settings.model)
        return
    text = "FLUX.1 [dev], and Redux with any FLUX.1, are for non-commercial use only"
    yield Finding(Level.NOTE, "licence", text)
    redux = settings.redux or loading.FLUX_REDUX
    folders = [locate(base, settings.revision), locate(redux, "")]
    for subject, source, folder in zip(("base", "redux"), (base, redux), folders, strict=True):
        if folder is not None:
            yield Finding(Level.OK, subject, f"{source} in {folder}")
        else:
            yield from _check_download(subject, source)
    if folders[0] is not None and folders[1] is not None:
        yield from _check_files(folders[0], folders[1])


def _check_embedded(model: str) -> Iterator[Finding]:
    """The models that come with us."""
    if model == loading.MINI:
        try:
            found = find_mini()
        except FileNotFoundError as error:
            yield Finding(Level.MISSING, "model", str(error))
            return
        problems = find_missing(found.base, found.redux)
        yield from (Finding(Level.MISSING, "weights", line) for line in problems)
        if problems:
            return
    yield Finding(Level.OK, "model", f"{model}, which needs no files but ours")


def _check_files(base: Path, redux: Path) -> Iterator[Finding]:
    from huggingface_hub import constants

    for line in find_missing(base, redux):
        if line.startswith(str(constants.HF_HUB_CACHE)) and not constants.HF_HUB_OFFLINE:
            yield Finding(Level.NOTE, "weights", f"{line}; serve fetches it")
        else:
            yield Finding(Level.MISSING, "weights", line)


def locate(source: str, revision: str) -> Path | None:
    """The folder of a checkpoint on this machine: its own, or its place in the hub's cache."""
    from huggingface_hub import snapshot_download

    path = Path(source).expanduser()
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(source, revision=revision or None, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or no name that the hub could know
        return None


def _check_download(subject: str, source: str) -> Iterator[Finding]:
    """Whether a repository that is not here yet can be fetched; does not ask the hub."""
    from huggingface_hub import constants, get_token

    if source.count("/") != 1 or source.startswith((".", "~", "/")):
        text = f"{source} is neither a folder nor the name of a Hugging Face repository"
        yield Finding(Level.MISSING, subject, text)
    elif constants.HF_HUB_OFFLINE:
        text = f"{source} is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to fetch"
        yield Finding(Level.MISSING, subject, text)
    elif get_token() is None:
        text = (
            f"{source} is not here yet, and no HF_TOKEN is set to fetch it; accept the licence at "
            f"https://huggingface.co/{source}, then set HF_TOKEN"
        )
        gated = source.startswith("black-forest-labs/")
        yield Finding(Level.MISSING if gated else Level.NOTE, subject, text)
    else:
        size = gigabytes(FLUX_BYTES)
        text = f"{source} is not here yet; serve fetches it (HF_TOKEN is set; up to {size})"
        yield Finding(Level.NOTE, subject, text)
        yield from check_space("model cache", Path(constants.HF_HUB_CACHE), FLUX_BYTES)
