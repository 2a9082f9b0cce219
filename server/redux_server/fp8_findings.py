"""The part of ``flux-redux doctor`` that tells whether the transformer can run in fp8."""

from collections.abc import Iterator

from redux_server.findings import Finding, Level
from redux_server.settings import ServerSettings

_SUBJECT = "fp8"


def check_fp8(settings: ServerSettings) -> Iterator[Finding]:
    """What the start-up self-test of fp8 says on each device; of a CPU only if fp8 is asked for."""
    import torch

    from redux_server.engine import devices

    is_wanted = settings.transformer_dtype == "fp8"
    if is_wanted and settings.backend != "engine":
        text = f"needs --backend engine, and it is {settings.backend}"
        yield Finding(Level.MISSING, _SUBJECT, text)
        return
    for name in devices(settings.device):
        is_there = name == "cpu" or torch.cuda.is_available()
        if is_there and (is_wanted or name != "cpu"):
            yield _judge(name, settings.dtype, is_wanted=is_wanted)


def _judge(name: str, dtype: str, *, is_wanted: bool) -> Finding:
    from redux_pipelines import fp8_check
    from redux_pipelines.components import resolve_device, resolve_dtype

    device = resolve_device(name)
    reason = fp8_check.refusal(device, resolve_dtype(dtype, device))
    if reason is not None:
        text = f"not on {name}: {reason}"
        if is_wanted:
            return Finding(Level.MISSING, _SUBJECT, f"{text}; choose --transformer-dtype auto")
        return Finding(Level.NOTE, _SUBJECT, text)
    if name == "cpu":
        text = "the self-test passed on the CPU, where fp8 is for trying out: it is slow"
        return Finding(Level.NOTE, _SUBJECT, text)
    advice = "" if is_wanted else "; --transformer-dtype fp8 saves a third of the weights' memory"
    return Finding(Level.OK, _SUBJECT, f"the self-test passed on {name}{advice}")
