"""Every setting of every verb, declared once, and the one error of a user's mistake.

A field here is a command-line flag (``--max-queue``), an environment variable
(``FLUX_REDUX_MAX_QUEUE``), a line of ``--help`` and a row of the documentation's table. Flags win
over the environment. Settings are built once, at the start of a verb, and passed down; nothing
below this module reads the environment. All are in one file: whoever looks for a setting finds it
beside its neighbours.
"""

import argparse
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from redux_pipelines.contract.types import PARALLEL, QUALITIES, CudaGraphs, LoadOptions

PREFIX = "FLUX_REDUX_"
_ON_GPU = ("flash4", "flash3", "flash3-hub", "cudnn", "flash2", "flash", "triton", "efficient")
_ON_CPU = ("onednn", "biased", "flash-cpu")
_ATTENTIONS = (*_ON_GPU, *_ON_CPU)
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
_SHOWN_DATA_DIR = "~/.local/share/flux-redux"
# Kubernetes gives every pod variables for each service; those of one named flux-redux look ours.
_SERVICE_LINK = re.compile(r"(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT_\d+_\w+)")
_PORT = r"(:(\d{1,4}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5]))?"
_BASE_URL = rf"((?i:https?)://([\w.-]*\w|\[[0-9a-fA-F:.]+\]){_PORT}(/[^\s?#\\]*)?)?"

GROUPS: dict[str, tuple[str, ...]] = {
    "Most used": (
        *("model", "base", "redux", "device", "quality"),
        *("host", "port", "data_dir", "api_keys_file", "max_queue"),
    ),
    "Model": ("revision", "backend", "dtype", "transformer_dtype", "attention"),
    "Speed and memory": (
        *("max_batch_size", "batch_timeout", "memory", "parallel", "compile", "cuda_graphs"),
        "warm_sizes",
    ),
    "Safety checker": ("safety_threshold", "force_safety_checker"),
    "HTTP API": (
        *("public_url", "trusted_proxies", "cors_origins", "sync_timeout_s", "keep_alive_s"),
        "playground",
    ),
    "Limits": (
        *("max_open_per_key", "queue_share", "rate_limit", "max_upload", "max_stored_uploads"),
        *("max_stored_tasks", "max_image_pixels", "disk_share", "min_free_disk"),
    ),
    "Storage": ("database_url", "blob_url", "retention_hours", "upload_retention_hours"),
    "Workers": (
        *("dispatch", "broker_url", "max_attempts", "lease_s", "step_timeout_s"),
        "drain_timeout_s",
    ),
    "Addresses and webhooks": (
        *("fetch_allow", "webhook_allow", "webhook_signature", "webhook_timeout_s"),
    ),
    "Logs and metrics": ("log_format", "log_level", "metrics_port"),
    "Connection": ("url", "key"),
}
"""The settings as ``--help`` and the documentation show them, in this order."""

S = TypeVar("S", bound="ModelSettings | ServerSettings | ClientSettings")


class UsageError(Exception):
    """Something the user can put right; the text says what is wrong and what is allowed."""


def option(default: Any, help_: str, **more: Any) -> Any:
    """Declare one setting: its default and its help text.

    ``more``, all optional: ``choices``, ``minimum``, ``maximum``, ``pattern`` (which the whole text
    has to match) and ``older_name``, by which it may still be given.
    """
    return field(default=default, metadata={"help": help_, **more})


def secret_option(help_: str) -> Any:
    """Declare a text that may hold a password: empty by default, and never shown."""
    return field(default="", repr=False, metadata={"help": help_})


def default_data_dir() -> Path:
    """``$XDG_DATA_HOME/flux-redux``, or ``~/.local/share/flux-redux``.

    Raises:
        UsageError: this user has no home directory.
    """
    try:
        root = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    except RuntimeError:
        raise UsageError("this user has no home directory; give --data-dir") from None
    return root.absolute() / "flux-redux"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model runs, and on what."""

    model: str = option(
        "mini",
        "mini (embedded; small, trained on icons), flux-dev or flux-schnell (downloaded from the "
        "Hugging Face Hub; with Redux their licence is non-commercial), tiny (random weights, for "
        "tests), "
        "fake (no network at all, for load tests), fake-slow (fake with steps of 20 ms)",
        choices=("mini", "flux-dev", "flux-schnell", "tiny", "fake", "fake-slow"),
    )
    base: str = option(
        "", "FLUX.1 weights: a diffusers folder or a Hub repository (without --redux: Redux-dev)"
    )
    redux: str = option("", "FLUX.1-Redux weights: a diffusers folder or a Hub repository")
    revision: str = option("", "Hub revision of --base or of the named model (default: newest)")
    backend: str = option("engine", "what runs the transformer", choices=("engine", "diffusers"))
    device: str = option(
        "auto",
        "auto (every GPU, else the CPU), cpu, cuda, or a list such as cuda:0,cuda:1",
        pattern=r"auto|cpu|cuda|cuda:\d+(,cuda:\d+)*",
    )
    dtype: str = option(
        "auto",
        "auto is bfloat16 on a GPU and float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    transformer_dtype: str = option(
        "auto",
        "fp8 (weights and inputs of the blocks' layers in e4m3: approximate; a GPU needs compute "
        "capability 8.9), same (as --dtype), auto (fp8 if the weights on disk are and the GPU can)",
        choices=("auto", "same", "fp8"),
    )
    max_batch_size: int = option(
        1,
        "images denoised together, of one task or of several of one size, steps and quality, all "
        "with a prompt or all without; 1 keeps results bitwise independent of batching",
        minimum=1,
    )
    memory: str = option(
        "auto",
        "where weights live: resident (all on the GPU), evict (the modulation and, if need be, the "
        "text encoders in host memory), offload (blocks stream from there too), auto (the first "
        "that fits)",
        choices=("auto", "resident", "evict", "offload"),
    )
    parallel: int = option(
        1,
        "GPUs that compute one image together, each with all weights: --device and those that "
        "follow it, or the devices in turns of so many, a worker for each; on a CPU processes, to "
        "try it out; needs the engine, and goes with neither --compile nor --cuda-graphs",
        choices=PARALLEL,
    )
    attention: str = option(
        "auto",
        "auto (the first that passes its self-test, see doctor), or those that may be used, in "
        f"order, of {', '.join(_ATTENTIONS)} (flash3-hub downloads a kernel)",
        pattern=r"auto|({0})(,({0}))*".format("|".join(_ATTENTIONS)),
    )
    quality: str = option(
        "exact",
        "tier of requests that name none: exact computes every step; balanced and fast reuse work "
        "between steps, need the engine, and were tuned on mini only, not on FLUX.1-dev",
        choices=QUALITIES,
    )
    compile: str = option(
        "off",
        "what torch.compile compiles at the start of a worker: blocks (the kinds of blocks), full "
        "(the whole step; for balanced and fast the kinds of blocks too), off; needs a C++ "
        "compiler; kept in $XDG_CACHE_HOME/flux-redux/compile for the next start",
        choices=("off", "blocks", "full"),
    )
    cuda_graphs: str = option(
        "auto",
        "for how many shapes (size, prompt, weights of pictures) steps are kept as CUDA graphs: 0 "
        "(none) to 64, or auto (in a worker on a GPU up to 8, of up to 768x768 pixels, in fp8 "
        "1024x1024, if the memory plan has room)",
        pattern=r"auto|\d|[1-5]\d|6[0-4]",
    )
    warm_sizes: str = option(
        "",
        "sizes such as 512x512,1024x1024 that a worker makes a picture of before it is ready, and "
        "that --compile is tried with (default: 1024x1024 on a GPU, 512x512 on a CPU)",
        pattern=r"\d+[x*]\d+(,\d+[x*]\d+)*",
        older_name="sizes",
    )
    safety_threshold: float = option(
        0.8, "score from which an image is withheld", minimum=0.01, maximum=1
    )

    def pipeline_options(self) -> dict[str, Any]:
        """The arguments of ``redux_pipelines.loading.load.load_pipeline``."""
        how = {item.name: getattr(self, item.name) for item in fields(LoadOptions)}
        names = ("model", "base", "redux", "revision")
        how["cuda_graphs"] = self.graphs
        return {**{name: getattr(self, name) or None for name in names}, **how}

    @property
    def graphs(self) -> CudaGraphs:
        """``cuda_graphs`` as the pipelines take it: by default none for several GPUs an image."""
        if self.cuda_graphs == "auto":
            return "auto" if self.parallel == 1 else 0
        return int(self.cuda_graphs)


@dataclass(frozen=True, kw_only=True)
class ServerSettings(ModelSettings):
    """What a server needs: ``serve``, ``worker``, and verbs that look after what those keep."""

    host: str = option("127.0.0.1", "address to listen on; others than loopback need an API key")
    port: int = option(8000, "port to listen on; 0 picks a free one", minimum=0, maximum=65535)
    cors_origins: str = option(
        "*",
        "origins whose web pages may call the API, separated by commas, such as "
        "https://app.example.com; * is any (each needs an API key all the same), none is none",
        pattern=r"\*|none|https?://[^/,\s]+(\s*,\s*https?://[^/,\s]+)*",
    )
    public_url: str = option(
        "",
        "base of the URLs we hand out, an http(s) URL without user name, query or fragment, such "
        "as https://gpu.example.com/flux (default: as the client called us)",
        pattern=_BASE_URL,
    )
    trusted_proxies: str = option(
        "127.0.0.1,::1",
        "addresses or networks of proxies whose X-Forwarded-* and Forwarded headers say how the "
        "client called us, separated by commas; * is all",
    )
    playground: str = option(
        "on",
        "the page at / to try the model in, for whoever has an API key",
        choices=("on", "off"),
    )
    data_dir: Path = field(
        default_factory=default_data_dir,
        metadata={"help": "where tasks, keys and images are kept"},
    )
    blob_url: str = option(
        "",
        "where pictures are kept: s3://bucket/prefix (with AWS_* variables), gs://, az:// or "
        "file:///folder (default: blobs in the data directory)",
    )
    min_free_disk: int = option(
        512, "free MiB on the disk below which a submit is answered 503; 0 is no limit", minimum=0
    )
    max_upload: int = option(
        20, "MiB of an uploaded file beyond which it is answered 413", minimum=1, maximum=200
    )
    max_image_pixels: int = option(
        100_000_000,
        "pixels (width times height) of a given picture beyond which its task fails; more than 40 "
        "million are decoded at a smaller size, and never as WEBP or AVIF",
        minimum=65_536,
        maximum=1_000_000_000,
    )
    max_stored_uploads: int = option(
        1024,
        "MiB of uploaded files of one API key that are kept, beyond which an upload is answered "
        "413; on a disk never more than half of what is free above --min-free-disk",
        minimum=1,
    )
    max_stored_tasks: int = option(
        0,
        "MiB that the tasks of one API key may store, their inline pictures and images until they "
        "are deleted, beyond which its submits are answered 429; 0: no limit but --disk-share",
        minimum=0,
    )
    disk_share: int = option(
        80,
        "percent of the disk above --min-free-disk that the tasks of one API key may fill while "
        "nothing else does; some room stays for others; 100: no such limit; not for buckets",
        minimum=1,
        maximum=100,
    )
    upload_retention_hours: float = option(168.0, "how long uploaded files stay", minimum=0)
    database_url: str = secret_option(
        "sqlite:///FILE or postgresql://USER:PASSWORD@HOST:PORT/NAME (default: a SQLite file in "
        "--data-dir)"
    )
    dispatch: str = option(
        "local",
        "what brings tasks to workers: local (this process runs them), sql (they poll the "
        "database), celery (they are told by a broker too); the latter two need PostgreSQL and "
        "`flux-redux worker` on each machine (older name: --engine)",
        choices=("local", "sql", "celery"),
        older_name="engine",
    )
    broker_url: str = secret_option(
        "Celery's broker for --dispatch celery: amqp://USER:PASSWORD@HOST:PORT/VHOST, redis:// "
        "or sqs://"
    )
    api_keys_file: str = option("", "file with one `name:key` per line, beside the stored keys")
    max_queue: int = option(1000, "open tasks beyond which a submit is answered 429", minimum=1)
    max_open_per_key: int = option(
        0,
        "open tasks of one API key beyond which its submits are answered 429; 0: no limit",
        minimum=0,
    )
    queue_share: int = option(
        80,
        "percent of --max-queue that one API key may fill while no other has tasks; of several "
        "each gets an equal part, and some room stays for the next; 100: no such limit",
        minimum=1,
        maximum=100,
    )
    rate_limit: int = option(
        0,
        "submits a minute that each API process takes of one key, the rest is answered 429; "
        "0: no limit",
        minimum=0,
    )
    sync_timeout_s: float = option(
        110.0, "seconds a submit in sync mode is held at most", minimum=0, maximum=3600
    )
    keep_alive_s: float = option(
        75.0,
        "seconds an idle connection is kept; longer than a proxy in front keeps its own (nginx and "
        "AWS 60, Google Cloud 600), or it loses requests to closed ones",
        minimum=1,
        maximum=3600,
    )
    max_attempts: int = option(3, "workers a task may cost before it is given up", minimum=1)
    batch_timeout: int = option(
        0,
        "milliseconds a task waits for others of its shape, if --max-batch-size allows company",
        minimum=0,
        maximum=10_000,
    )
    lease_s: float = option(30.0, "seconds after which a silent worker loses its task", minimum=1)
    step_timeout_s: float = option(
        0.0,
        "seconds a step on the device may take before its worker counts as hung, ends itself and "
        "returns its tasks; 0: twenty times the slowest so far, and at least 30 (300 for the first "
        "task of a size)",
        minimum=0,
    )
    drain_timeout_s: float = option(
        60.0, "seconds a stopping worker may finish its task", minimum=0
    )
    retention_hours: float = option(168.0, "how long ended tasks and their images stay", minimum=0)
    force_safety_checker: bool = option(False, "check every image, whatever the request says")
    fetch_allow: str = option(
        "",
        "private hosts or networks that `image` may point to, separated by commas: minio means "
        "its ports 80 and 443, minio:9000 that port, minio:* all; 10.0.0.0/8:9000 and [fd00::1]:80 "
        "too",
    )
    webhook_allow: str = option(
        "",
        "private hosts or networks that a webhook may call, separated by commas, with ports as "
        "for --fetch-allow; those named here may be called over http too",
    )
    webhook_signature: str = option(
        "wavespeed",
        "how webhooks are signed: as the hosted service does (v3), as Standard Webhooks (v1), or "
        "both in one header",
        choices=("wavespeed", "standard", "both"),
    )
    webhook_timeout_s: float = option(
        30.0, "seconds a webhook's receiver may take to answer", minimum=1, maximum=1200
    )
    metrics_port: int = option(
        0,
        "port on --host where `flux-redux worker` answers /livez, /readyz and /metrics of its own; "
        "0 is none",
        minimum=0,
        maximum=65535,
    )
    log_format: str = option(
        "auto",
        "shape of the log lines: text (for people), json (one object a line), auto (text on a "
        "terminal, else json)",
        choices=("auto", "text", "json"),
    )
    log_level: str = option("info", "least severe line", choices=("debug", "info", "warning"))

    @property
    def database(self) -> str:
        """Where tasks and keys are kept, as a SQLAlchemy URL."""
        return self.database_url or f"sqlite:///{self.data_dir / 'tasks.db'}"

    @property
    def trusted_proxy_entries(self) -> tuple[str, ...]:
        """The addresses and networks of ``--trusted-proxies``."""
        return _entries(self.trusted_proxies)

    @property
    def fetch_allow_entries(self) -> tuple[str, ...]:
        """The hosts and networks of ``--fetch-allow``."""
        return _entries(self.fetch_allow)

    @property
    def webhook_allow_entries(self) -> tuple[str, ...]:
        """The hosts and networks of ``--webhook-allow``."""
        return _entries(self.webhook_allow)

    @property
    def blobs_dir(self) -> Path:
        """Where pictures are kept unless ``--blob-url`` says otherwise."""
        return self.data_dir / "blobs"

    @property
    def temporary_dir(self) -> Path:
        """Where all is kept that need not outlive its process."""
        return self.data_dir / "tmp"

    @property
    def ballast_path(self) -> Path:
        """A file that is there to be deleted when the disk is full."""
        return self.data_dir / "ballast"

    @property
    def is_loopback(self) -> bool:
        """True when only this machine can reach the server."""
        return self.host in LOOPBACK_HOSTS


@dataclass(frozen=True, kw_only=True)
class ClientSettings:
    """What ``submit``, ``cancel`` and ``uploads`` need to reach a server."""

    url: str = option("http://127.0.0.1:8000", "base URL of the server")
    key: str = secret_option("API key (better in FLUX_REDUX_KEY than on the command line)")


def _entries(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


SETTINGS_CLASSES = (ServerSettings, ClientSettings)
_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
}
_METAVARS: dict[Any, str] = {int: "N", float: "N", Path: "PATH"}
_BOOLEANS = dict.fromkeys(("1", "true", "yes", "on"), True)
_BOOLEANS |= dict.fromkeys(("0", "false", "no", "off"), False)


def environment_name(name: str) -> str:
    """The environment variable that sets the field ``name``."""
    return PREFIX + name.upper()


def flag_name(name: str) -> str:
    """The command-line flag that sets the field ``name``."""
    return "--" + name.replace("_", "-")


def names_of(cls: type[S]) -> frozenset[str]:
    """The names of the settings of ``cls``, older ones too."""
    return frozenset(name for item in fields(cls) for name in _names(item))


def add_flags(parser: argparse.ArgumentParser, cls: type[S], *, only: Collection[str] = ()) -> None:
    """Give ``parser`` a flag for each field of ``cls``, by group, or for the few in ``only``."""
    groups = _grouped(cls)
    if only:
        groups = {"Settings": [f for items in groups.values() for f in items if f.name in only]}
    for title, items in groups.items():
        group = parser.add_argument_group(title)
        for item in items:
            _add_flag(group, item)


def build(cls: type[S], given: Mapping[str, Any], environ: Mapping[str, str]) -> S:
    """Build settings from flags (``given``), then ``environ``, then defaults.

    Raises:
        UsageError: a value of the wrong type or out of range, two names of one setting that
            contradict each other, or a variable with our prefix that no setting has (a typing error
            would otherwise pass unnoticed).
    """
    _refuse_unknown_variables(environ)
    values = {}
    for item in fields(cls):
        if found := _given(item, given, environ):
            values[item.name] = _value(item, *found)
    return cls(**values)


def to_environment(settings: ServerSettings) -> dict[str, str]:
    """The variables from which a child process builds these very settings.

    Older names are emptied, so that what the child inherits under one contradicts nothing.
    """
    older = {environment_name(old): "" for item in fields(settings) for old in _names(item)[1:]}
    now = {environment_name(f.name): str(getattr(settings, f.name)) for f in fields(settings)}
    return older | now


def describe(cls: type[S]) -> list[tuple[str, str, str, str, str]]:
    """``(group, flag, variable, default, help)`` per field, for the documentation's table."""
    return [
        (title, flag_name(f.name), environment_name(f.name), _shown_default(f), f.metadata["help"])
        for title, items in _grouped(cls).items()
        for f in items
    ]


def _grouped(cls: type[S]) -> "dict[str, list[Field[Any]]]":
    mine = {item.name: item for item in fields(cls)}
    groups = {
        title: [mine[name] for name in names if name in mine] for title, names in GROUPS.items()
    }
    return {title: items for title, items in groups.items() if items}


def _names(item: "Field[Any]") -> tuple[str, ...]:
    older = item.metadata.get("older_name")
    return (item.name, older) if older else (item.name,)


def _add_flag(group: "argparse._ArgumentGroup", item: "Field[Any]") -> None:
    choices, default = item.metadata.get("choices"), _shown_default(item)
    how: dict[str, Any] = {"metavar": _METAVARS.get(item.type)}
    if item.type is bool:
        how = {"action": argparse.BooleanOptionalAction}
    elif choices:
        how = {"metavar": "{" + ",".join(map(str, choices)) + "}"}
    text = item.metadata["help"] + (f" (default: {default})" if default else "")
    for name in _names(item):
        shown = text if name == item.name else argparse.SUPPRESS
        group.add_argument(flag_name(name), dest=name, default=argparse.SUPPRESS, help=shown, **how)


def _shown_default(item: "Field[Any]") -> str:
    if item.default is MISSING:
        return _SHOWN_DATA_DIR
    return "" if item.default == "" or item.default is False else str(item.default)


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    items = [item for cls in SETTINGS_CLASSES for item in fields(cls)]
    known = {environment_name(name) for item in items for name in _names(item)}
    unknown = sorted(
        name
        for name in environ
        if name.startswith(PREFIX) and name not in known and not _is_service_link(name, environ)
    )
    if unknown:
        shown = ", ".join(sorted(environment_name(item.name) for item in items))
        meant = "".join(_nearest(name, known) for name in unknown)
        raise UsageError(
            f"unknown environment variable {', '.join(unknown)}; known are {shown}{meant}"
        )


def _nearest(variable: str, known: Collection[str]) -> str:
    """Which of the ``known`` variables was probably meant, in the words of an error."""
    by_name = {name.removeprefix(PREFIX): name for name in known}
    given = variable.removeprefix(PREFIX).upper()
    found = (
        get_close_matches(given, by_name, n=1)
        or [name for name in sorted(by_name) if given.startswith(name) or name.startswith(given)][
            :1
        ]
    )
    return f"; {variable} is perhaps {by_name[found[0]]}" if given and found else ""


def _is_service_link(variable: str, environ: Mapping[str, str]) -> bool:
    name = variable.removeprefix(PREFIX)
    is_url = re.match(r"(tcp|udp|sctp)://", environ[variable]) is not None
    return bool(_SERVICE_LINK.fullmatch(name)) or (name.endswith("PORT") and is_url)


def _given(
    item: "Field[Any]", given: Mapping[str, Any], environ: Mapping[str, str]
) -> tuple[str, Any] | None:
    """The flag or variable that sets ``item``, and what it says; None where there is none."""
    names = _names(item)
    found = {flag_name(name): given[name] for name in names if name in given} or {
        variable: environ[variable]
        for variable in map(environment_name, names)
        if environ.get(variable) and not _is_service_link(variable, environ)
    }
    if len(set(found.values())) > 1:
        said = " and ".join(f"{source} {value}" for source, value in found.items())
        raise UsageError(f"{said} contradict each other; give only {next(iter(found))}")
    return next(iter(found.items()), None)


def _value(item: "Field[Any]", source: str, raw: Any) -> Any:
    """``raw``, which ``source`` says, as the type of ``item`` and within its limits."""
    try:
        value = _convert(raw, item.type)
    except (ValueError, RuntimeError):  # RuntimeError: ~name of a user that does not exist
        raise UsageError(f"{source} must be {_KINDS[item.type]}, got {raw!r}") from None
    if complaint := _complaint(value, item.metadata):
        raise UsageError(f"{source} {complaint}")
    return value


def _convert(raw: Any, kind: Any) -> Any:
    if kind is bool:
        if str(raw).lower() not in _BOOLEANS:
            raise ValueError
        return _BOOLEANS[str(raw).lower()]
    if kind is Path:
        if not str(raw):
            raise ValueError
        return Path(raw).expanduser().absolute()
    value = kind(raw)
    if kind is float and not math.isfinite(value):
        raise ValueError
    return value


def _complaint(value: Any, limits: Mapping[str, Any]) -> str:
    if "choices" in limits and value not in limits["choices"]:
        return f"must be one of {', '.join(map(str, limits['choices']))}, got {value!r}"
    if "pattern" in limits and not re.fullmatch(limits["pattern"], value):
        return f"must be {limits['help']}; got {value!r}"
    if "minimum" in limits and value < limits["minimum"]:
        return f"must be at least {limits['minimum']}, got {value!r}"
    if "maximum" in limits and value > limits["maximum"]:
        return f"must be at most {limits['maximum']}, got {value!r}"
    return ""
