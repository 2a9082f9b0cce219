"""Whether what runs on this device is right: tests, kernels, attention, and some whole blocks.

Errors are relative, in the Euclidean norm, unless a name says otherwise. Times nothing.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from gpu_report import paths
from gpu_report.runner import NotRun, Section
from gpu_report.scale import DOUBLES, SINGLES, Scale
from gpu_report.subject import (
    GUIDANCE,
    SCHEDULE,
    STEP,
    TEXT_TOKENS,
    Subject,
    implementations,
)
from redux_kernels import self_test as kernel_test
from redux_pipelines.attention import choice
from redux_pipelines.attention.backends import IMPLEMENTATIONS
from redux_pipelines.attention.groups import Groups, Implementation, reference
from redux_pipelines.conditioning.tokens import Conditioning, Tokens
from redux_pipelines.denoising.denoiser import Denoiser
from redux_pipelines.denoising.diffusers_backend import DiffusersDenoiser
from redux_pipelines.denoising.engine import EngineDenoiser
from redux_pipelines.fp8 import self_test as fp8_test
from redux_pipelines.fp8.weights import Quantized
from redux_pipelines.loading.flux_weights import fp8_layers, load_flux
from redux_pipelines.network.flux import FluxParams
from redux_pipelines.network.operators import TorchOperators

FULL_SIZE_TESTS = "tests/pipelines/memory/test_full_size.py"
NAMED_AT_MOST = 20
NO_TESTS = 5  # pytest's exit status where none was there to run
STOPPED = -1
MOST_PROCESSES = 6
_TINY = 1e-30  # for numbers of which no error is allowed
_KIND = "(PASSED|SKIPPED|FAILED|ERROR)"
_ENDED = re.compile(
    rf"^(?:(?:\[gw\d+\] \[ *\d+%\] )?{_KIND} (tests/.+?)(?= - |$)|(tests/\S+::.+?) {_KIND}\b)",
    re.MULTILINE,
)
_HAS_GPU = re.compile(r"mark\.gpu|KERNEL_DEVICES")


# --- the project's own tests ----------------------------------------------------------------------


def gpu_tests(scale: Scale, section: Section, limit_s: float, log: Path) -> None:
    """The tests marked ``gpu``, but for those that fill the card; by pytest, in a process.

    What that prints goes to ``log``. Raises ``RuntimeError`` if one fails or time runs out.
    """
    if find_spec("pytest") is None:
        raise NotRun("pytest is not installed")
    if not (paths.ROOT / "tests").is_dir():
        raise NotRun("the tests are not here")
    code = _pytest(scale, limit_s, log)
    printed = log.read_text(errors="replace")
    section.update(exit_code=code, log=log.name, **outcomes(printed))
    missing = _MISSING.search(printed)
    if missing and not (section["passed"] or section["failed_count"] or section["skipped"]):
        raise NotRun(f"the tests need {missing[1]}, which is not installed")
    if code not in (0, NO_TESTS):
        why = "did not end in time" if code == STOPPED else f"ended with {code}"
        raise RuntimeError(f"pytest {why}: {', '.join(section['failed']) or printed[-500:]}")


_MISSING = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'")


def test_files(scale: Scale) -> list[str]:
    """Those that hold such tests, but for the full-size ones; others may need what is not here."""
    folders = [paths.ROOT / name for name in scale.tests]
    files = [
        file for each in folders for file in (each.rglob("test_*.py") if each.is_dir() else [each])
    ]
    names = [
        file.relative_to(paths.ROOT).as_posix()
        for file in files
        if _HAS_GPU.search(file.read_text())
    ]
    return sorted(set(names) - {FULL_SIZE_TESTS})


def _pytest(scale: Scale, limit_s: float, log: Path) -> int:
    """The exit status; ``STOPPED`` if pytest was ended after ``limit_s``."""
    launch = Path(__file__).with_name("launch.py")
    command = [sys.executable, str(launch), "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider"]
    command += ["-o", "filterwarnings=default", "--durations=10"]
    command += [*_parallel(), "--continue-on-collection-errors", *test_files(scale)]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1"}
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command,
            cwd=paths.ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return STOPPED
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _parallel() -> list[str]:
    """Compiling kernels takes most of the time, and a core each."""
    processes = min((os.cpu_count() or 1) // 2, MOST_PROCESSES)
    if processes < 2 or find_spec("xdist") is None:
        return []
    return ["-p", "xdist", "-n", str(processes)]


def outcomes(printed: str) -> dict[str, Any]:
    """How many tests ended how, and which failed, by what pytest printed until it was ended."""
    ended: dict[str, set[str]] = {"PASSED": set(), "SKIPPED": set(), "FAILED": set()}
    for first, name, same_name, last in _ENDED.findall(printed):
        kind = (first or last).replace("ERROR", "FAILED")
        ended[kind].add(name or same_name)
    failed = sorted(ended["FAILED"])
    return {
        "passed": len(ended["PASSED"] - ended["FAILED"]),
        "skipped": len(ended["SKIPPED"]),
        "failed": failed[:NAMED_AT_MOST],
        "failed_count": len(failed),
    }


# --- kernels and attention, each by itself --------------------------------------------------------


@torch.inference_mode()
def operators(subject: Subject, section: Section) -> None:
    """Every kernel and every attention at FLUX's widths against float32."""
    config = subject.scale.transformer
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    device, dtype = subject.device, subject.dtype
    verdicts = kernel_test.self_test(device, heads=heads, head_dim=head_dim, dtype=dtype)
    section["kernels"] = {
        name: {"refused": reason, "share_of_tolerance": _share(name, subject, reason)}
        for name, reason in verdicts.items()
    }
    section["attention"] = {
        each.name: _attention(each, subject, head_dim) for each in IMPLEMENTATIONS
    }
    wrong = [name for name, reason in verdicts.items() if reason and "differs" in reason]
    wrong += [
        name
        for name, found in section["attention"].items()
        if found["refused"] and found["refused"].startswith("is wrong")
    ]
    if wrong:
        raise RuntimeError(f"wrong on this device: {', '.join(wrong)}")


def _share(name: str, subject: Subject, refused: str | None) -> float | None:
    """The largest error of a kernel's test, as a share of what is allowed there."""
    if refused is not None:
        return None
    config = subject.scale.transformer
    draw = kernel_test.Draw(
        config["num_attention_heads"],
        config["attention_head_dim"],
        subject.dtype,
        subject.device,
        torch.Generator().manual_seed(0),
    )
    shares = [
        float(((got.float() - want).abs() / (atol + rtol * want.abs()).clamp_min(_TINY)).max())
        for got, want, atol, rtol in kernel_test.TESTS[name](draw)
    ]
    return round(max(shares), 4)


def _attention(each: Implementation, subject: Subject, head_dim: int) -> dict[str, Any]:
    device, dtype = subject.device, subject.dtype
    reason = choice.refusal(each, device, dtype, head_dim)
    error = None
    if reason is None:
        error = float(f"{choice.self_test(each, device, dtype, head_dim):.3g}")
    return {"refused": reason, "worst_query_error": error}


# --- some whole blocks ----------------------------------------------------------------------------


@torch.inference_mode()
def blocks(subject: Subject, section: Section) -> None:
    """2 + 3 blocks at the full width: a step against diffusers' network in float32.

    All have the same numbers for weights and the same request. What diffusers' network in the
    model's dtype is off by is the measure for ours.
    """
    config = {
        **subject.scale.transformer,
        "num_layers": DOUBLES,
        "num_single_layers": SINGLES,
    }
    section.update(side=subject.scale.side, dtype=str(subject.dtype).removeprefix("torch."))
    section.update(blocks=[DOUBLES, SINGLES], errors={})
    wanted = _theirs(subject, config, torch.float32)
    errors = section["errors"]
    errors["diffusers"] = relative_error(_theirs(subject, config, subject.dtype), wanted)
    for name, result in _ours(subject, config):
        errors[name] = relative_error(result, wanted)


def _theirs(subject: Subject, config: dict[str, Any], dtype: torch.dtype) -> Tensor:
    denoiser = DiffusersDenoiser(diffusers_model(subject, config, dtype))
    return _predict(subject, denoiser, dtype)


def diffusers_model(subject: Subject, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """Diffusers' transformer with the weights that ours has."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config)
    tensors = subject.tensors(dtype, **config)
    model.load_state_dict(dict(tensors), assign=True)
    return model.eval().requires_grad_(False)


def _ours(subject: Subject, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The engine: plain in float32, plain in the model's dtype, as chosen, and in fp8."""
    exact = Implementation("by-head", _by_head, ("cuda", "cpu"), (torch.float32, subject.dtype))
    params = FluxParams.of(config)
    for name, dtype in (("engine float32", torch.float32), ("engine plain", subject.dtype)):
        denoiser = EngineDenoiser(_flux(subject, params, dtype), exact, TorchOperators())
        yield name, _predict(subject, denoiser, dtype)
    for name, is_fp8 in (("engine", False), ("engine fp8", True)):
        if is_fp8 and fp8_test.refusal(subject.device, subject.dtype, params.hidden_size):
            continue
        chosen, attention, _ = implementations(subject.device, subject.dtype, params, is_fp8)
        flux = _flux(subject, params, subject.dtype, is_fp8=is_fp8)
        denoiser = EngineDenoiser(flux, attention, chosen)
        yield name, _predict(subject, denoiser, subject.dtype)


def _flux(subject: Subject, params: FluxParams, dtype: torch.dtype, *, is_fp8: bool = False) -> Any:
    depth = {"num_layers": params.depth, "num_single_layers": params.depth_single_blocks}
    tensors: Any = subject.tensors(dtype, **depth)
    if is_fp8:
        tensors = Quantized(tensors, fp8_layers(params), subject.device)
    return load_flux(params, tensors, device=subject.device, dtype=dtype)


def _predict(subject: Subject, denoiser: Denoiser, dtype: torch.dtype) -> Tensor:
    """A step of made-up tokens, whose numbers bfloat16 has exactly."""
    prepared = denoiser.prepare(_request(subject), SCHEDULE, subject.grid(subject.scale.side))
    img = subject.noise(subject.grid(subject.scale.side)).to(dtype)
    return prepared.predict(img, STEP).float()


def _request(subject: Subject) -> Conditioning:
    config, scale = subject.scale.transformer, subject.scale
    generator = torch.Generator().manual_seed(0)
    width = config["joint_attention_dim"]
    rows = (scale.siglip["image_size"] // scale.siglip["patch_size"]) ** 2
    picture = torch.randn(rows, width, generator=generator).bfloat16().float()
    txt = Tokens(torch.zeros(1, width), copies=TEXT_TOKENS)
    vec = torch.zeros(config["pooled_projection_dim"])
    return Conditioning(txt, (Tokens(picture),), vec, GUIDANCE)


def _by_head(q: Tensor, k: Tensor, v: Tensor, groups: Groups, into: Tensor | None = None) -> Tensor:
    """The definition, head by head: all heads' logits at once would be gigabytes."""
    heads = [reference(q[:, [i]], k[:, [i]], v[:, [i]], groups) for i in range(q.shape[1])]
    out = torch.cat(heads, dim=1)
    return out if into is None else into.copy_(out)


def relative_error(given: Tensor, wanted: Tensor) -> float:
    """Of all numbers together."""
    difference = (given.double() - wanted.double()).norm() / wanted.double().norm()
    return float(f"{float(difference):.3g}")
