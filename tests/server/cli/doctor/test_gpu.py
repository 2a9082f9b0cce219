"""What ``doctor`` says of GPUs: what is there, what fits, which attention, whether fp8."""

from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fp8_products import needs_fp8
from pipelines.pretended_gpus import PretendedGpus
from redux_pipelines.attention import choice, flash_libraries
from redux_pipelines.attention.choice import NAMES
from redux_pipelines.attention.groups import Implementation
from redux_pipelines.loading.tiny import build_tiny
from redux_pipelines.memory import cards
from redux_pipelines.memory.cards import Card
from redux_server import settings as settings_module
from redux_server.cli.doctor import gpu
from redux_server.cli.doctor.findings import Finding, Level
from redux_server.settings import ServerSettings, describe
from server.cli.doctor.findings import levels, only


def test_a_gpu_that_torch_cannot_use_is_missing(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = list(gpu.check_gpu(replace(settings, device="cuda:0,cuda:1")))
    assert found[0].level is Level.MISSING
    assert "cannot use cuda:0, cuda:1" in found[0].text


@pytest.mark.parametrize(
    ("device", "text"),
    [("cuda:0", "cannot use cuda:1"), ("auto", "--parallel 2 needs 2 GPUs for each worker")],
)
def test_too_few_gpus_for_one_image_are_missing(
    device: str, text: str, settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(gpu, "_describe_gpu", str)
    found = list(gpu.check_gpu(replace(settings, device=device, parallel=2)))
    missing = [each for each in found if each.level is Level.MISSING]
    assert len(missing) == 1 and text in missing[0].text


def test_gpus_are_described(settings: ServerSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = namedtuple("properties", "name major minor total_memory")(
        "NVIDIA T4", 7, 5, 16_000_000_000
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    text = {f.subject: f.text for f in gpu.check_gpu(replace(settings, device="cuda"))}
    assert text["cuda:0"] == ("NVIDIA T4, compute capability 7.5, 16.0 GB")
    assert text["would run"] == "engine backend, bfloat16 on cuda"
    assert "try --dtype float16" in text["dtype"]


# --- memory ---------------------------------------------------------------------------------------


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU with 22 GB to use."""
    PretendedGpus(1).install(monkeypatch)
    monkeypatch.setattr(cards, "card_of", lambda device: Card(f"GPU {device}", 22 * 10**9))


@pytest.mark.usefixtures("one_gpu")
def test_what_a_gpu_would_hold_is_said(settings: ServerSettings) -> None:
    chosen = replace(settings, device="cuda:0", model="flux-dev")
    found = next(iter(gpu.check_memory(chosen)))
    assert (found.level, found.subject) == (Level.OK, "cuda:0 memory")
    assert found.text.startswith("FLUX.1 [dev] in bfloat16: evict: 19.5 GB on the GPU, peak 21.4")
    assert "of 22.0 GB on GPU cuda:0" in found.text


@pytest.mark.usefixtures("one_gpu")
def test_a_mode_that_does_not_fit_the_gpu_is_noted(settings: ServerSettings) -> None:
    chosen = replace(settings, device="cuda:0", model="flux-dev", memory="resident")
    found = list(gpu.check_memory(chosen))
    assert [each.level for each in found] == [Level.OK, Level.NOTE]
    assert "15.1 GB more than GPU cuda:0 has" in found[1].text


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(("pages", "is_short"), [(4_000_000, True), (16_000_000, False)])
def test_too_little_host_memory_is_noted(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch, pages: int, is_short: bool
) -> None:
    sizes = {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(gpu.os, "sysconf", sizes.__getitem__)
    found = levels(gpu.check_memory(replace(settings, device="cuda:0", model="flux-dev")))
    assert ("host memory" in found) == is_short


def test_without_a_gpu_nothing_is_said_of_its_memory(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not list(gpu.check_memory(replace(settings, device="auto")))


def test_an_imagined_card_is_judged_in_bfloat16_and_fp8(settings: ServerSettings) -> None:
    for model, label in (("mini", "[dev]"), ("flux-schnell", "[schnell]")):
        found = list(gpu.check_card(replace(settings, model=model), 24))
        assert [(each.level, each.subject) for each in found] == 2 * [(Level.OK, "24 GB card")]
        assert found[0].text.startswith(f"FLUX.1 {label} in bfloat16: evict: 19.8 GB on the GPU")
        assert f"FLUX.1 {label} in bfloat16 with fp8: evict: 12.2 GB" in found[1].text


def test_an_imagined_card_may_be_too_small(settings: ServerSettings) -> None:
    found = list(gpu.check_card(settings, 2))
    assert {each.level for each in found} == {Level.NOTE}
    assert "a larger card or --device cpu" in found[0].text


def test_a_card_is_judged_for_the_weights_that_are_here(
    settings: ServerSettings, tmp_path: Path
) -> None:
    base, redux = build_tiny(tmp_path / "weights")
    chosen = replace(settings, base=str(base), redux=str(redux))
    found = list(gpu.check_card(chosen, 12))
    assert "resident: 0.7 GB on the GPU" in found[0].text
    (base / "vae" / "config.json").unlink()
    assert "resident" not in next(iter(gpu.check_card(chosen, 12))).text


# --- attention ------------------------------------------------------------------------------------


@pytest.fixture
def mini(settings: ServerSettings) -> ServerSettings:
    """The embedded model, which has attention to choose, unlike the fake one."""
    return replace(settings, model="mini")


def found(settings: ServerSettings) -> list[Finding]:
    return list(gpu.check_attention(settings))


def test_the_chosen_one_and_every_refused_one_are_told(mini: ServerSettings) -> None:
    findings = found(mini)
    assert {each.subject for each in findings} == {"attention"}
    assert {each.level for each in findings} == {Level.OK}
    assert [each.text for each in findings] == [
        "onednn, for heads of 64 in float32 on cpu",
        "fit for cpu, best first: onednn, biased, flash-cpu",
        "not flash4, flash3, flash3-hub, cudnn, flash2, flash, triton, efficient: "
        "runs on cuda, not on cpu",
    ]


def test_a_forced_one_that_is_refused_is_missing(mini: ServerSettings) -> None:
    first = found(replace(mini, attention="cudnn"))[0]
    assert first.level is Level.MISSING
    assert "cudnn runs on cuda, not on cpu; what can be used here: auto, onednn" in first.text


def test_a_name_that_none_has_is_missing(mini: ServerSettings) -> None:
    first = found(replace(mini, attention="cuddn"))[0]
    assert first.level is Level.MISSING
    assert "'cuddn' is not one of auto, flash4" in first.text


def test_one_that_would_be_downloaded_is_not_tried(
    mini: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_name: str) -> None:
        raise AssertionError("doctor downloads nothing")

    monkeypatch.setattr(flash_libraries.importlib, "import_module", load)
    first, second, *_ = found(replace(mini, attention="flash3-hub"))
    assert first.level is Level.NOTE
    assert "tried by serve only: it downloads kernels-community/flash-attn3" in first.text
    assert second.text.startswith("fit for cpu")
    texts = [each.text for each in found(replace(mini, attention="flash3-hub,biased"))]
    assert texts[1].startswith("biased, for heads of 64")


def test_a_model_folder_says_how_wide_its_heads_are(mini: ServerSettings, tmp_path: Path) -> None:
    base, redux = build_tiny(tmp_path / "weights")
    text = found(replace(mini, base=str(base), redux=str(redux)))[0].text
    assert text == "onednn, for heads of 16 in float32 on cpu"


def test_weights_that_are_not_here_yet_are_taken_to_be_fluxs(mini: ServerSettings) -> None:
    text = found(replace(mini, model="flux-dev", dtype="bfloat16"))[0].text
    assert text == "biased, for heads of 128 in bfloat16 on cpu"


@pytest.mark.parametrize(
    "change", [{"backend": "diffusers"}, {"model": "fake"}, {"device": "cuda:0"}], ids=str
)
def test_nothing_is_said_where_none_is_chosen(
    mini: ServerSettings, change: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not found(replace(mini, **change))


def test_a_broken_library_is_a_line_of_the_report(
    mini: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_name: str) -> None:
        raise OSError("libcudart.so.12: cannot open shared object file")

    broken = replace(flash_libraries.FLASH2, devices=("cpu",), capabilities=None)
    assert isinstance(broken, Implementation)
    broken = replace(broken, dtypes=(torch.float32,))
    monkeypatch.setattr(flash_libraries.importlib, "import_module", fail)
    everything = (broken, *choice.IMPLEMENTATIONS[-2:])
    monkeypatch.setattr(choice, "IMPLEMENTATIONS", everything)
    texts = [each.text for each in found(mini)]
    assert texts[0] == "biased, for heads of 64 in float32 on cpu"
    assert texts[-1] == (
        "not flash2: cannot be loaded: OSError: libcudart.so.12: cannot open shared object file"
    )


def test_the_setting_knows_every_attention_in_its_order() -> None:
    assert settings_module._ATTENTIONS == NAMES
    (help_,) = (text for _, flag, _, _, text in describe(ServerSettings) if flag == "--attention")
    assert ", ".join(NAMES) in help_


def test_attention_is_tested_with_its_device_current(
    mini: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus, seen = PretendedGpus(2).install(monkeypatch), []

    def check(*_: object) -> Iterator[Finding]:
        for _ in range(2):
            seen.append(gpus.current)
            yield Finding(Level.OK, "attention", "")

    monkeypatch.setattr(gpu, "_check_device", check)
    for _ in gpu.check_attention(replace(mini, device="cuda:1,cpu,cuda:0,cuda:2")):
        assert gpus.current == 0
    assert seen == [1, 1, 0, 0, 0, 0], "of cuda:1, of the CPU and of cuda:0; there is no cuda:2"


# --- fp8 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "level"), [("auto", Level.NOTE), ("fp8", Level.MISSING)])
def test_why_a_gpu_cannot_run_fp8_is_said(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch, wanted: str, level: Level
) -> None:
    PretendedGpus(1).install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    given = replace(settings, device="cuda:0", transformer_dtype=wanted)
    found = only(gpu.check_fp8(given))
    assert found.level is level
    assert "not on cuda:0: fp8 needs compute capability 8.9" in found.text
    assert "NVIDIA A100 has 8.0" in found.text


def test_fp8_that_passed_its_self_test_is_said(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    PretendedGpus(1).install(monkeypatch)
    monkeypatch.setattr("redux_pipelines.fp8.self_test.refusal", lambda *_: None)
    found = only(gpu.check_fp8(replace(settings, device="cuda:0")))
    assert (found.level, found.text[:32]) == (Level.OK, "the self-test passed on cuda:0; ")


def test_fp8_is_tested_with_its_device_current(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus, seen = PretendedGpus(2).install(monkeypatch), []
    monkeypatch.setattr(
        "redux_pipelines.fp8.self_test.refusal", lambda *_: seen.append(gpus.current)
    )
    list(gpu.check_fp8(replace(settings, device="cuda:1,cuda:0,cuda:2")))
    assert seen == [1, 0]


@needs_fp8
def test_fp8_on_a_cpu_is_a_matter_of_asking_for_it(settings: ServerSettings) -> None:
    assert list(gpu.check_fp8(settings)) == []
    found = only(gpu.check_fp8(replace(settings, transformer_dtype="fp8")))
    assert found.level is Level.NOTE
    assert "the self-test passed on the CPU" in found.text


def test_fp8_needs_the_engine(settings: ServerSettings) -> None:
    given = replace(settings, transformer_dtype="fp8", backend="diffusers")
    found = only(gpu.check_fp8(given))
    assert (found.level, found.text) == (
        Level.MISSING,
        "needs --backend engine, and it is diffusers",
    )
