"""What ``doctor`` says of attention."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from redux_pipelines.attention import choice, flash_libraries
from redux_pipelines.attention.choice import NAMES
from redux_pipelines.attention.groups import Implementation
from redux_pipelines.loading.tiny import build_tiny
from redux_server import settings as settings_module
from redux_server.cli.doctor import gpu, report
from redux_server.cli.doctor.findings import Finding, Level
from redux_server.settings import ServerSettings, describe


@pytest.fixture
def settings(tmp_path: Path) -> ServerSettings:
    return ServerSettings(model="mini", data_dir=tmp_path / "data", port=0, device="cpu")


def found(settings: ServerSettings) -> list[Finding]:
    return list(gpu.check_attention(settings))


def test_the_chosen_one_and_every_refused_one_are_told(settings: ServerSettings) -> None:
    findings = found(settings)
    assert {each.subject for each in findings} == {"attention"}
    assert {each.level for each in findings} == {Level.OK}
    assert [each.text for each in findings] == [
        "onednn, for heads of 64 in float32 on cpu",
        "fit for cpu, best first: onednn, biased, flash-cpu",
        "not flash4, flash3, flash3-hub, cudnn, flash2, flash, triton, efficient: "
        "runs on cuda, not on cpu",
    ]


def test_the_doctor_reports_it(
    settings: ServerSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.check_attention in report.CHECKS
    report.doctor(settings)
    assert "onednn, for heads of 64 in float32 on cpu" in capsys.readouterr().out


def test_a_forced_one_that_is_refused_is_missing(settings: ServerSettings) -> None:
    first = found(replace(settings, attention="cudnn"))[0]
    assert first.level is Level.MISSING
    assert "cudnn runs on cuda, not on cpu; what can be used here: auto, onednn" in first.text


def test_a_name_that_none_has_is_missing(settings: ServerSettings) -> None:
    first = found(replace(settings, attention="cuddn"))[0]
    assert first.level is Level.MISSING
    assert "'cuddn' is not one of auto, flash4" in first.text


def test_one_that_would_be_downloaded_is_not_tried(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_name: str) -> None:
        raise AssertionError("doctor downloads nothing")

    monkeypatch.setattr(flash_libraries.importlib, "import_module", load)
    first, second, *_ = found(replace(settings, attention="flash3-hub"))
    assert first.level is Level.NOTE
    assert "tried by serve only: it downloads kernels-community/flash-attn3" in first.text
    assert second.text.startswith("fit for cpu")
    texts = [each.text for each in found(replace(settings, attention="flash3-hub,biased"))]
    assert texts[1].startswith("biased, for heads of 64")


def test_a_model_folder_says_how_wide_its_heads_are(
    settings: ServerSettings, tmp_path: Path
) -> None:
    base, redux = build_tiny(tmp_path / "weights")
    text = found(replace(settings, base=str(base), redux=str(redux)))[0].text
    assert text == "onednn, for heads of 16 in float32 on cpu"


def test_weights_that_are_not_here_yet_are_taken_to_be_fluxs(settings: ServerSettings) -> None:
    text = found(replace(settings, model="flux-dev", dtype="bfloat16"))[0].text
    assert text == "biased, for heads of 128 in bfloat16 on cpu"


@pytest.mark.parametrize(
    "change", [{"backend": "diffusers"}, {"model": "fake"}, {"device": "cuda:0"}], ids=str
)
def test_nothing_is_said_where_none_is_chosen(
    settings: ServerSettings, change: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not found(replace(settings, **change))


def test_a_broken_library_is_a_line_of_the_report(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_name: str) -> None:
        raise OSError("libcudart.so.12: cannot open shared object file")

    broken = replace(flash_libraries.FLASH2, devices=("cpu",), capabilities=None)
    assert isinstance(broken, Implementation)
    broken = replace(broken, dtypes=(torch.float32,))
    monkeypatch.setattr(flash_libraries.importlib, "import_module", fail)
    everything = (broken, *choice.IMPLEMENTATIONS[-2:])
    monkeypatch.setattr(choice, "IMPLEMENTATIONS", everything)
    texts = [each.text for each in found(settings)]
    assert texts[0] == "biased, for heads of 64 in float32 on cpu"
    assert texts[-1] == (
        "not flash2: cannot be loaded: OSError: libcudart.so.12: cannot open shared object file"
    )


def test_the_setting_knows_every_attention_in_its_order() -> None:
    assert settings_module._ATTENTIONS == NAMES
    (help_,) = (text for _, flag, _, _, text in describe(ServerSettings) if flag == "--attention")
    assert ", ".join(NAMES) in help_
