"""The report: what it says, when it is an error, and that nothing breaks it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest

from redux_server.cli import main
from redux_server.cli.doctor import gpu, host, report
from redux_server.cli.doctor.findings import Finding
from redux_server.settings import ServerSettings


def test_a_sound_machine_gets_a_readable_report(
    settings: ServerSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.doctor(settings) == 0
    text = capsys.readouterr().out
    for expected in ("python", "torch", "diffusers", "fake, which needs no files", "OpenNSFW"):
        assert expected in text
    assert "Nothing is missing" in text
    assert not settings.data_dir.exists(), "doctor only looks"


def test_something_missing_is_counted_and_is_an_error(
    settings: ServerSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.doctor(replace(settings, host="0.0.0.0")) == 1
    text = capsys.readouterr().out
    assert "MISSING  API keys" in text
    assert text.endswith("\n1 missing\n")


def test_a_check_that_breaks_becomes_a_line(
    settings: ServerSettings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def check_the_moon(_: ServerSettings) -> Iterator[Finding]:
        raise RuntimeError("too far")

    monkeypatch.setattr(report, "CHECKS", (check_the_moon, host.check_python))
    assert report.doctor(settings) == 0
    assert "note     the moon    cannot be examined: RuntimeError: too far" in (
        capsys.readouterr().out
    )


def test_the_command_line_takes_a_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(report, "CHECKS", (host.check_python,))
    arguments = ["doctor", "--data-dir", str(tmp_path), "--gpu-memory"]
    assert main.run([*arguments, "80"]) == 0
    assert "80 GB card  FLUX.1 [dev] in bfloat16: resident" in capsys.readouterr().out
    assert main.run([*arguments, "-3"]) == main.EXIT_USAGE
    assert "--gpu-memory must be 0 to 1000, got -3" in capsys.readouterr().err


def test_a_token_is_mentioned_but_never_printed(
    settings: ServerSettings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_verysecret")
    report.doctor(replace(settings, model="flux-schnell"))
    text = capsys.readouterr().out
    assert "HF_TOKEN is set" in text
    assert "verysecret" not in text
    assert "MISSING  base" not in text


def test_the_doctor_reports_it(
    settings: ServerSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.check_attention in report.CHECKS
    report.doctor(replace(settings, model="mini"))
    assert "onednn, for heads of 64 in float32 on cpu" in capsys.readouterr().out
