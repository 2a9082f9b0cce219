"""From the text of a flag or variable to a value of the right type. Knows no setting."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
}
_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True}
_BOOLEANS |= {"0": False, "false": False, "no": False, "off": False}


def parse_value(raw: Any, kind: Any, limits: Mapping[str, Any]) -> Any:
    """``raw`` as a ``kind`` within ``limits`` (see ``redux_server.settings.option``).

    Raises:
        ValueError: it is none; the text goes on after the setting's name.
    """
    try:
        value = _parse(raw, kind)
    except (ValueError, RuntimeError):  # RuntimeError: ~name of a user that does not exist
        raise ValueError(f"must be {_KINDS[kind]}, got {raw!r}") from None
    _check_limits(value, limits)
    return value


def _check_limits(value: Any, limits: Mapping[str, Any]) -> None:
    if "choices" in limits and value not in limits["choices"]:
        raise ValueError(f"must be one of {', '.join(limits['choices'])}, got {value!r}")
    if "pattern" in limits and not re.fullmatch(limits["pattern"], value):
        raise ValueError(f"must be {limits['help']}; got {value!r}")
    if "minimum" in limits and value < limits["minimum"]:
        raise ValueError(f"must be at least {limits['minimum']}, got {value!r}")
    if "maximum" in limits and value > limits["maximum"]:
        raise ValueError(f"must be at most {limits['maximum']}, got {value!r}")


def _parse(raw: Any, kind: Any) -> Any:
    if kind is bool and not isinstance(raw, bool):
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
