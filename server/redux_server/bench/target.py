"""A server under test, as ``--target`` names it: where it is, whose key, what it costs.

Knows no HTTP. The key itself is never part of a ``Target``: only the name of its variable is.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from redux_server.net.guard import is_http_url
from redux_server.parameters import MODELS
from redux_server.settings import LOOPBACK_HOSTS, UsageError

MODES = ("poll", "sync", "stream")
IDEMPOTENCY = ("auto", "yes", "no")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_EXAMPLE = "ours=http://127.0.0.1:8000,key_env=FLUX_REDUX_KEY"


@dataclass(frozen=True, slots=True)
class Target:
    """One server. Prices are in dollars; a price that is not known is None.

    ``weights`` is a name that two targets share if they claim to run the very same weights.
    ``idempotency`` says whether a submit may be repeated under its ``Idempotency-Key``.
    """

    name: str
    url: str
    key_env: str = ""
    price: float | None = None
    gpu_hour: float | None = None
    mode: str = "poll"
    model: str = MODELS[0]
    weights: str = ""
    idempotency: str = "auto"

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine, so that asking it sends nothing anywhere."""
        return urlsplit(self.url).hostname in LOOPBACK_HOSTS

    def describe(self) -> dict[str, Any]:
        """For reports: what was given; the key is not among it."""
        return {name: getattr(self, name) for name in _OPTIONS if getattr(self, name)} | {
            "url": self.url
        }


def read_targets(given: Sequence[str]) -> list[Target]:
    """The targets of all ``--target`` flags.

    Raises:
        UsageError: none, two of one name, or one that is not understood.
    """
    if not given:
        raise UsageError(f"bench needs a server to measure: --target {_EXAMPLE}")
    targets = [read_target(text) for text in given]
    names = [target.name for target in targets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two targets are named {twice[0]}; give each a name of its own")
    return targets


def read_target(text: str) -> Target:
    """``NAME=URL,option=value,...`` as a target.

    Raises:
        UsageError: not of that form. The text is not repeated: a key may have slipped into it.
    """
    head, *rest = text.split(",")
    name, separator, url = head.partition("=")
    if not separator or not _NAME.fullmatch(name):
        raise UsageError(
            f"--target must be NAME=URL,key_env=VARIABLE, such as {_EXAMPLE}; NAME is of letters, "
            "digits, '_', '-' and '.'"
        )
    options: dict[str, Any] = {}
    for part in rest:
        option, separator, value = part.partition("=")
        if option not in _OPTIONS or not separator or option in options:
            raise UsageError(_complaint(name, option, is_twice=option in options))
        options[option] = _read(name, option, value)
    return Target(name=name, url=_checked_url(name, url), **options)


def read_keys(targets: Sequence[Target], environ: Mapping[str, str]) -> dict[str, str]:
    """The key of each target by its name, from the environment.

    Raises:
        UsageError: a variable that is not set, or holds what no key is.
    """
    keys = {}
    for target in targets:
        key = environ.get(target.key_env, "").strip() if target.key_env else ""
        if target.key_env and not key:
            raise UsageError(
                f"target {target.name}: the variable {target.key_env} is not set; put the key "
                "into it"
            )
        if not (key.isascii() and key.isprintable()):
            raise UsageError(
                f"target {target.name}: {target.key_env} has characters that no key has; copy it "
                "again"
            )
        keys[target.name] = key
    return keys


def _complaint(name: str, option: str, *, is_twice: bool) -> str:
    if option == "key":
        return (
            f"target {name}: a key is never given on the command line, where other users and the "
            "shell's history see it; put it into a variable and give key_env=VARIABLE"
        )
    if is_twice:
        return f"target {name}: {option} is given twice"
    return f"target {name}: options are {', '.join(f'{each}=' for each in _OPTIONS)}"


def _checked_url(name: str, url: str) -> str:
    if not is_http_url(url):
        raise UsageError(f"target {name}: its URL must be like http://127.0.0.1:8000")
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(
            f"target {name}: its URL must have no user, password, query or fragment; a key goes "
            "into a variable (key_env=VARIABLE)"
        )
    return url.rstrip("/")


def _read(name: str, option: str, value: str) -> Any:
    try:
        return _OPTIONS[option](value)
    except ValueError as error:
        raise UsageError(f"target {name}: {option} must be {error}") from None


def _dollars(value: str) -> float:
    try:
        dollars = float(value)
    except ValueError:
        dollars = math.nan
    if not 0 <= dollars < math.inf:
        raise ValueError(f"dollars, such as 0.025; got {value!r}")
    return dollars


def _variable(value: str) -> str:
    if not _VARIABLE.fullmatch(value):
        raise ValueError("the name of an environment variable")
    return value


def _model(value: str) -> str:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", value, re.ASCII):
        raise ValueError(f"a model's name, such as {MODELS[0]}; got {value!r}")
    return value


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def read(value: str) -> str:
        if value not in names:
            raise ValueError(f"one of {', '.join(names)}; got {value!r}")
        return value

    return read


_OPTIONS: dict[str, Callable[[str], Any]] = {
    "key_env": _variable,
    "price": _dollars,
    "gpu_hour": _dollars,
    "mode": _one_of(MODES),
    "model": _model,
    "weights": str,
    "idempotency": _one_of(IDEMPOTENCY),
}
