"""From a model's name or the path of a checkpoint to a pipeline.

Finds or downloads the files, checks them before the slow load, and turns what can go wrong into
``WeightsError`` with what to do. Imports torch only when a real model is asked for.

FLUX.1-dev and FLUX.1-Redux-dev come under the FLUX.1 [dev] Non-Commercial License; so does every
use of Redux with FLUX.1-schnell.
"""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redux_pipelines.contract.types import PARALLEL, QUALITIES, LoadOptions, Pipeline, Quality
from redux_pipelines.errors import WeightsAway, WeightsError
from redux_pipelines.fake import SLOW_STEP_S, FakePipeline
from redux_weights.embedded import find_mini
from redux_weights.identity import weights_digest
from redux_weights.layout import BASE_FILES, REDUX_FILES, find_missing

if TYPE_CHECKING:
    from redux_pipelines.pipeline import ReduxPipeline

logger = logging.getLogger(__name__)

FLUX_DEV = "black-forest-labs/FLUX.1-dev"
FLUX_SCHNELL = "black-forest-labs/FLUX.1-schnell"
FLUX_REDUX = "black-forest-labs/FLUX.1-Redux-dev"
"""Non-commercial and gated: licence to be accepted at https://huggingface.co/<name>."""

_REPOSITORIES = {"flux-dev": FLUX_DEV, "flux-schnell": FLUX_SCHNELL}

MINI = "mini"
"""The embedded model: small, trained on icons, free of other models' licences."""

UNTRAINED = ("tiny", "fake", "fake-slow")
"""Models without trained weights: pictures are noise or one colour."""

WITHOUT_NETWORK = ("fake", "fake-slow")

MODELS = (MINI, *UNTRAINED, *_REPOSITORIES)
"""Names that ``load_pipeline`` knows."""


def caveat(model: str) -> str | None:
    """What someone who runs ``model`` (a name, as in ``ModelInfo``) must know of its pictures."""
    if model == MINI:
        return (
            "the embedded model 'mini' is small and was trained on icons: it varies simple "
            "pictures; of a photograph it keeps colours and layout. For real variations use "
            "--model flux-dev, or --base and --redux"
        )
    if model in UNTRAINED:
        return (
            f"the model {model!r} was never trained, so its pictures are noise or plain colour; "
            "real ones need trained weights (--model flux-dev, or --base and --redux)"
        )
    return None


def load_pipeline(
    *,
    model: str | None = None,
    base: str | Path | None = None,
    redux: str | Path | None = None,
    revision: str | None = None,
    **options: Any,
) -> Pipeline:
    """Load a pipeline by name, or from ``base`` and ``redux``.

    ``model``: ``mini`` (embedded, trained on icons), ``tiny`` (random weights), ``fake`` (no
    network at all), ``fake-slow`` (the same, but its steps take time), ``flux-dev`` or
    ``flux-schnell``; these two and Redux are for non-commercial use. ``base`` and ``redux`` are
    directories in diffusers' layout or hub repository ids and override the name's; without
    ``redux`` FLUX.1-Redux-dev is taken. ``revision`` is that of ``base`` on the hub.

    ``options`` are those of ``LoadOptions``.
    ``HF_TOKEN``, ``HF_HOME`` and ``HF_HUB_OFFLINE`` work as in huggingface_hub. Raises
    ``WeightsError`` for a checkpoint that cannot be had, ``AttentionError`` where no attention can
    be used, ``MemoryPlanError`` for a GPU that is too small, ``ValueError`` for an unknown option.
    """
    how = LoadOptions(**options)
    if how.backend not in ("diffusers", "engine"):
        raise ValueError(f"backend={how.backend!r} is not one of 'diffusers', 'engine'")
    if model not in (None, *MODELS):
        raise ValueError(f"model={model!r} is not one of {', '.join(MODELS)}")
    tier = _quality(how.quality, how.backend)
    check_parallel(how)
    if model in WITHOUT_NETWORK:
        return FakePipeline(
            step_s=0.0 if model == "fake" else SLOW_STEP_S,
            quality=tier,
            max_batch_size=how.max_batch_size,
        )
    _check_attention(how.attention, how.backend)
    silence_bars()
    if base is None and model == MINI:
        return _load_mini(how)
    if base is None and model == "tiny":
        return _load_tiny(how)
    source = base or _REPOSITORIES.get(str(model))
    if source is None:
        raise ValueError("load_pipeline needs a model name or a base checkpoint")
    name = model if model in _REPOSITORIES else Path(source).name
    return _load(source, redux or FLUX_REDUX, revision, str(name), how)


def check_parallel(how: LoadOptions) -> None:
    """Raise ``ValueError`` for a number of devices that cannot be, or what does not go with it."""
    if how.parallel not in PARALLEL:
        raise ValueError(f"parallel={how.parallel!r} is not one of 1, 2, 4")
    if how.parallel == 1:
        return
    if how.backend != "engine":
        raise ValueError(f"parallel={how.parallel} needs backend='engine', not {how.backend!r}")
    if how.memory not in ("auto", "resident"):
        raise ValueError(
            f"parallel={how.parallel} needs all weights on each GPU: memory='resident', or 'auto', "
            f"which is that then, not {how.memory!r}"
        )


def _check_attention(attention: str, backend: str) -> None:
    """Raise ``ValueError`` for names that no attention has, before anything slow is done."""
    if attention == "auto":
        return
    if backend != "engine":
        raise ValueError(f"attention={attention!r} needs backend='engine', not {backend!r}")
    from redux_pipelines.attention.choice import candidates_for

    candidates_for(attention)


def _quality(name: str, backend: str) -> Quality:
    found = next((each for each in QUALITIES if each == name), None)
    if found is None:
        raise ValueError(f"quality={name!r} is not one of {', '.join(map(repr, QUALITIES))}")
    if found != "exact" and backend != "engine":
        raise ValueError(
            f"quality={name!r} needs backend='engine': backend={backend!r} has only 'exact'"
        )
    return found


def silence_bars() -> None:
    """No bars for reading and writing files: in a log they are noise. Downloads keep theirs."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()


def _load(
    base: str | Path, redux: str | Path, revision: str | None, name: str, how: LoadOptions
) -> "ReduxPipeline":
    logger.warning(
        "%s with Redux: FLUX.1 [dev] weights and Redux are licensed for non-commercial use only",
        name,
    )
    base_dir = locate(base, BASE_FILES, option="--base", revision=revision)
    redux_dir = locate(redux, REDUX_FILES, option="--redux")
    return _assemble(base_dir, redux_dir, name, how)


def _load_mini(how: LoadOptions) -> "ReduxPipeline":
    """The embedded model; its text encoders are so small that they are loaded at once."""
    try:
        found = find_mini()
    except FileNotFoundError as error:
        raise WeightsError(str(error)) from error
    return _assemble(found.base, found.redux, MINI, how, preload_text=True)


def _load_tiny(how: LoadOptions) -> "ReduxPipeline":
    """The random-weight model; text encoders are loaded at once, for its files do not stay."""
    from redux_pipelines.loading.tiny import build_tiny

    with tempfile.TemporaryDirectory(prefix="redux-tiny-") as directory:
        base, redux = build_tiny(Path(directory))
        return _assemble(base, redux, "tiny", how, preload_text=True)


def _assemble(
    base: Path, redux: Path, name: str, how: LoadOptions, *, preload_text: bool = False
) -> "ReduxPipeline":
    problems = find_missing(base, redux)
    if problems:
        raise WeightsError("the checkpoint is incomplete:\n" + "\n".join(problems))
    from redux_pipelines.devices import as_current, resolve_device
    from redux_pipelines.loading.components import load_components
    from redux_pipelines.pipeline import ReduxPipeline

    with as_current(resolve_device(how.device.split(",")[0])):
        if how.parallel > 1:
            from redux_pipelines.loading.parallel import load_on_several

            components = load_on_several(base, redux, how)
        else:
            components = load_components(base, redux, how)
        if preload_text:
            components.text_encoders.load()
    pipeline = ReduxPipeline(
        components,
        name=name,
        max_batch_size=how.max_batch_size,
        quality=_quality(how.quality, how.backend),
        weights=weights_digest(base, redux),
    )
    logger.info("loaded %s", pipeline.info)
    return pipeline


def locate(
    source: str | Path, patterns: Sequence[str], *, option: str, revision: str | None = None
) -> Path:
    """The local directory of a checkpoint; files of a hub repository are downloaded if need be.

    Only files that match ``patterns`` are fetched. ``option`` names the setting to change in error
    texts. Raises ``WeightsError``.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not is_repository_id(str(source)):
        raise WeightsError(
            f"{source} is neither a directory nor a hub repository id: "
            f"give {option} a directory in diffusers' layout"
        )
    return _download(str(source), patterns, option, revision)


def is_repository_id(source: str) -> bool:
    """Whether ``source`` is written as ``OWNER/NAME``, as repositories of the hub are."""
    owner, _, name = source.partition("/")
    return bool(owner and name) and "/" not in name and not source.startswith((".", "~"))


def _download(repository: str, patterns: Sequence[str], option: str, revision: str | None) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except errors.GatedRepoError as error:
        reason = (
            f"access is gated: accept the licence at https://huggingface.co/{repository}, "
            "set HF_TOKEN to a token of that account"
        )
        raise _weights_error(repository, reason, option) from error
    except errors.RevisionNotFoundError as error:
        reason = f"it has no revision {revision!r}: correct --revision"
        raise _weights_error(repository, reason, option) from error
    except errors.RepositoryNotFoundError as error:
        reason = "it does not exist or needs a login: check the name, set HF_TOKEN"
        raise _weights_error(repository, reason, option) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        is_chosen = constants.HF_HUB_OFFLINE or isinstance(error, errors.OfflineModeIsEnabled)
        raise _not_cached(repository, option, is_offline=is_chosen) from error
    except OSError as error:  # every other hub, network or disk error derives from it
        reason = f"{type(error).__name__}: {error}"
        raise _weights_error(repository, reason, option, WeightsAway) from error


def _not_cached(repository: str, option: str, *, is_offline: bool) -> WeightsError:
    if is_offline:
        reason = (
            "it is not in the local cache and HF_HUB_OFFLINE is set: unset it, or download the "
            "checkpoint elsewhere with `hf download`"
        )
        return _weights_error(repository, reason, option)
    reason = (
        "it is not in the local cache and the hub cannot be reached: connect, or download it "
        "elsewhere with `hf download`"
    )
    return _weights_error(repository, reason, option, WeightsAway)


def _weights_error(
    repository: str, reason: str, option: str, kind: type[WeightsError] = WeightsError
) -> WeightsError:
    return kind(
        f"cannot get {repository}: {reason}, or pass {option} DIR with a directory in "
        "diffusers' layout"
    )
