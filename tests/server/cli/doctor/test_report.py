"""The report: what it says, when it is an error, and that nothing breaks it."""

import socket
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from e2e.live import free_port
from redux_pipelines.errors import WeightsError
from redux_pipelines.images import safety
from redux_pipelines.loading.tiny import build_tiny
from redux_pipelines.memory import cards
from redux_pipelines.memory.cards import Card
from redux_server.api.auth import KeyRing
from redux_server.cli import main
from redux_server.cli.doctor import gpu as gpu_module
from redux_server.cli.doctor import host, report
from redux_server.cli.doctor import model as model_module
from redux_server.cli.doctor.report import Finding, Level
from redux_server.database.migration import open_database
from redux_server.settings import ServerSettings

HUB = huggingface_hub.constants


@pytest.fixture
def settings(tmp_path: Path) -> ServerSettings:
    return ServerSettings(model="fake", data_dir=tmp_path / "data", port=0, device="cpu")


@pytest.fixture(autouse=True)
def empty_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing in the cache, no token, and no way to the network."""

    def nothing(source: str, **options: object) -> str:
        assert options["local_files_only"], "doctor downloads nothing"
        raise LocalEntryNotFoundError(source)

    monkeypatch.setattr(HUB, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(HUB, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)


def levels(findings: Iterator[Finding]) -> dict[str, Level]:
    return {finding.subject: finding.level for finding in findings}


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


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


def test_a_gpu_that_torch_cannot_use_is_missing(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = list(gpu_module.check_gpu(replace(settings, device="cuda:0,cuda:1")))
    assert found[0].level is Level.MISSING
    assert "cannot use cuda:0, cuda:1" in found[0].text


def test_gpus_are_described(settings: ServerSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = namedtuple("properties", "name major minor total_memory")(
        "NVIDIA T4", 7, 5, 16_000_000_000
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    text = {f.subject: f.text for f in gpu_module.check_gpu(replace(settings, device="cuda"))}
    assert text["cuda:0"] == ("NVIDIA T4, compute capability 7.5, 16.0 GB")
    assert text["would run"] == "engine backend, bfloat16 on cuda"
    assert "try --dtype float16" in text["dtype"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU with 22 GB to use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cards, "card_of", lambda device: Card(f"GPU {device}", 22 * 10**9))


@pytest.mark.usefixtures("gpu")
def test_what_a_gpu_would_hold_is_said(settings: ServerSettings) -> None:
    chosen = replace(settings, device="cuda:0", model="flux-dev")
    found = next(iter(report.check_memory(chosen)))
    assert (found.level, found.subject) == (Level.OK, "cuda:0 memory")
    assert found.text.startswith("FLUX.1 [dev] in bfloat16: evict: 18.9 GB on the GPU, peak 20.9")
    assert "of 22.0 GB on GPU cuda:0" in found.text


@pytest.mark.usefixtures("gpu")
def test_a_mode_that_does_not_fit_the_gpu_is_noted(settings: ServerSettings) -> None:
    chosen = replace(settings, device="cuda:0", model="flux-dev", memory="resident")
    found = list(report.check_memory(chosen))
    assert [each.level for each in found] == [Level.OK, Level.NOTE]
    assert "15.1 GB more than GPU cuda:0 has" in found[1].text


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("pages", "is_short"), [(4_000_000, True), (16_000_000, False)])
def test_too_little_host_memory_is_noted(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch, pages: int, is_short: bool
) -> None:
    sizes = {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(gpu_module.os, "sysconf", sizes.__getitem__)
    found = levels(report.check_memory(replace(settings, device="cuda:0", model="flux-dev")))
    assert ("host memory" in found) == is_short


def test_without_a_gpu_nothing_is_said_of_its_memory(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not list(report.check_memory(replace(settings, device="auto")))


def test_an_imagined_card_is_judged_in_bfloat16_and_fp8(settings: ServerSettings) -> None:
    for model, label in (("mini", "[dev]"), ("flux-schnell", "[schnell]")):
        found = list(report.check_card(replace(settings, model=model), 24))
        assert [(each.level, each.subject) for each in found] == 2 * [(Level.OK, "24 GB card")]
        assert found[0].text.startswith(f"FLUX.1 {label} in bfloat16: evict: 18.9 GB on the GPU")
        assert f"FLUX.1 {label} in bfloat16 with fp8: evict: 10.3 GB" in found[1].text


def test_an_imagined_card_may_be_too_small(settings: ServerSettings) -> None:
    found = list(report.check_card(settings, 2))
    assert {each.level for each in found} == {Level.NOTE}
    assert "a larger card or --device cpu" in found[0].text


def test_a_card_is_judged_for_the_weights_that_are_here(
    settings: ServerSettings, tmp_path: Path
) -> None:
    base, redux = build_tiny(tmp_path / "weights")
    chosen = replace(settings, base=str(base), redux=str(redux))
    found = list(report.check_card(chosen, 12))
    assert "resident: 0.5 GB on the GPU" in found[0].text
    (base / "vae" / "config.json").unlink()
    assert "resident" not in next(iter(report.check_card(chosen, 12))).text


def test_the_command_line_takes_a_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(report, "CHECKS", (host.check_python,))
    arguments = ["doctor", "--data-dir", str(tmp_path), "--gpu-memory"]
    assert main.run([*arguments, "80"]) == 0
    assert "80 GB card  FLUX.1 [dev] in bfloat16: resident" in capsys.readouterr().out
    assert main.run([*arguments, "-3"]) == main.EXIT_USAGE
    assert "--gpu-memory must be 0 to 1000, got -3" in capsys.readouterr().err


def test_gated_weights_that_are_not_here_need_a_token(settings: ServerSettings) -> None:
    found = list(report.check_model(replace(settings, model="flux-dev")))
    assert levels(iter(found)) == {
        "licence": Level.NOTE,
        "base": Level.MISSING,
        "redux": Level.MISSING,
    }
    assert "https://huggingface.co/black-forest-labs/FLUX.1-dev, then set HF_TOKEN" in found[1].text


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


def test_offline_weights_must_be_in_the_cache(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HUB, "HF_HUB_OFFLINE", True)
    found = levels(report.check_model(replace(settings, model="flux-dev")))
    assert found["base"] is found["redux"] is Level.MISSING


def test_folders_of_weights_are_checked_file_by_file(
    settings: ServerSettings, tmp_path: Path
) -> None:
    base, redux = build_tiny(tmp_path / "weights")
    chosen = replace(settings, base=str(base), redux=str(redux))
    assert levels(report.check_model(chosen))["base"] is Level.OK
    (base / "vae" / "config.json").unlink()
    found = list(report.check_model(chosen))
    assert found[0].level is Level.MISSING
    assert str(base / "vae" / "config.json") in found[0].text


def test_a_half_downloaded_checkpoint_is_only_noted(
    settings: ServerSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, redux = build_tiny(tmp_path / "hub" / "models")
    (redux / "image_embedder" / "config.json").unlink()
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda source, **_: str(redux if "Redux" in source else base),
    )
    found = levels(report.check_model(replace(settings, model="flux-dev")))
    assert found["weights"] is Level.NOTE
    monkeypatch.setattr(HUB, "HF_HUB_OFFLINE", True)
    found = levels(report.check_model(replace(settings, model="flux-dev")))
    assert found["weights"] is Level.MISSING


def test_a_base_that_is_neither_folder_nor_repository_is_missing(settings: ServerSettings) -> None:
    chosen = replace(settings, base="/no/such/place", redux="a/b")
    assert levels(report.check_model(chosen))["base"] is Level.MISSING


def test_a_wrong_safety_model_is_missing(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(**_: object) -> None:
        raise WeightsError("open-nsfw.onnx has another sha256")

    monkeypatch.setattr(safety, "OpenNsfwChecker", wrong)
    finding = only(model_module.check_safety_checker(settings))
    assert (finding.level, finding.text) == (Level.MISSING, "open-nsfw.onnx has another sha256")


def test_a_data_dir_under_a_file_is_missing(settings: ServerSettings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert only(host.check_data_dir(replace(settings, data_dir=folder))).level is (
            Level.MISSING
        )


def test_a_data_dir_without_the_right_to_write_is_missing(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report.os, "access", lambda *_: False)
    assert only(host.check_data_dir(settings)).level is Level.MISSING


@pytest.mark.parametrize(
    ("kind", "level"),
    [("nfs4", Level.NOTE), ("cifs", Level.NOTE), ("ext4", Level.OK), ("overlay", Level.OK)],
)
def test_network_file_systems_are_warned_of(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch, kind: str, level: Level
) -> None:
    monkeypatch.setattr(report, "filesystem_of", lambda _: kind)
    assert levels(host.check_data_dir(settings))["data dir"] is level


@pytest.mark.parametrize(
    ("free_bytes", "level"),
    [(10**6, Level.MISSING), (10**9, Level.NOTE), (10**11, Level.OK)],
)
def test_little_space_is_said(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch, free_bytes: int, level: Level
) -> None:
    usage = namedtuple("usage", "total used free")(10**12, 0, free_bytes)
    monkeypatch.setattr(report.shutil, "disk_usage", lambda _: usage)
    assert levels(host.check_data_dir(settings))["disk space"] is level


def test_the_file_system_is_that_of_the_deepest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "40 22 0:40 / /srv/my\\040data rw - nfs4 host:/x rw\n"
        "41 22 0:41 / /srv rw - xfs /dev/sdb rw\n"
    )
    for path, kind in (("/srv/my data/x", "nfs4"), ("/srv/my", "xfs"), ("/opt", "ext4")):
        assert host.filesystem_of(Path(path), mounts=mounts) == kind


def test_a_port_in_use_is_missing(settings: ServerSettings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        taken.settimeout(0)
        finding = only(host.check_port(replace(settings, port=port)))
    assert finding.level is Level.MISSING
    assert "choose another --port" in finding.text


def test_a_port_on_which_we_run_already_is_noted(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_is_ours", lambda _: True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        finding = only(host.check_port(replace(settings, port=taken.getsockname()[1])))
    assert finding.level is Level.NOTE


def test_keys_are_counted_without_those_revoked(settings: ServerSettings, tmp_path: Path) -> None:
    database = open_database(settings.database)
    ring = KeyRing(database)
    ring.create("a")
    ring.create("b")
    ring.revoke(ring.list()[0].id)
    database.dispose()
    (tmp_path / "keys").write_text("c:0123456789abcdef\n")
    chosen = replace(settings, api_keys_file=str(tmp_path / "keys"), host="0.0.0.0")
    assert only(host.check_api_keys(chosen)) == Finding(Level.OK, "API keys", "2 valid")


def test_without_keys_only_loopback_is_fine(settings: ServerSettings) -> None:
    assert only(host.check_api_keys(settings)).level is Level.NOTE
    assert only(host.check_api_keys(replace(settings, host="::"))).level is Level.MISSING


def test_a_keys_file_of_no_use_is_missing(settings: ServerSettings, tmp_path: Path) -> None:
    chosen = replace(settings, api_keys_file=str(tmp_path / "absent"))
    assert only(host.check_api_keys(chosen)).level is Level.MISSING


@pytest.mark.parametrize(("wanted", "level"), [("auto", Level.NOTE), ("fp8", Level.MISSING)])
def test_why_a_gpu_cannot_run_fp8_is_said(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch, wanted: str, level: Level
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    given = replace(settings, device="cuda:0", transformer_dtype=wanted)
    found = only(report.check_fp8(given))
    assert found.level is level
    assert "not on cuda:0: fp8 needs compute capability 8.9" in found.text
    assert "NVIDIA A100 has 8.0" in found.text


def test_fp8_that_passed_its_self_test_is_said(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("redux_pipelines.fp8.self_test.refusal", lambda *_: None)
    found = only(report.check_fp8(replace(settings, device="cuda:0")))
    assert (found.level, found.text[:32]) == (Level.OK, "the self-test passed on cuda:0; ")


def test_fp8_on_a_cpu_is_a_matter_of_asking_for_it(settings: ServerSettings) -> None:
    assert list(report.check_fp8(settings)) == []
    found = only(report.check_fp8(replace(settings, transformer_dtype="fp8")))
    assert found.level is Level.NOTE
    assert "the self-test passed on the CPU" in found.text


def test_fp8_needs_the_engine(settings: ServerSettings) -> None:
    given = replace(settings, transformer_dtype="fp8", backend="diffusers")
    found = only(report.check_fp8(given))
    assert (found.level, found.text) == (
        Level.MISSING,
        "needs --backend engine, and it is diffusers",
    )


def test_one_machine_has_nothing_to_share(settings: ServerSettings) -> None:
    assert list(report.check_cluster(settings)) == []


def test_what_several_machines_lack_is_said(settings: ServerSettings) -> None:
    url = f"postgresql://u:hunter2@127.0.0.1:{free_port()}/db"
    given = replace(settings, database_url=url, dispatch="celery")
    database, dispatch = report.check_cluster(given)
    assert (database.level, database.subject) == (Level.MISSING, "database")
    assert "check --database-url" in database.text
    assert (dispatch.level, dispatch.subject) == (Level.MISSING, "dispatch")
    assert "needs --broker-url" in dispatch.text
    assert "hunter2" not in database.text
    assert only(host.check_api_keys(given)).text == "cannot be counted: see the database"


@pytest.mark.cluster
def test_a_database_of_several_machines_is_named(
    settings: ServerSettings, postgres_url: str
) -> None:
    found = only(report.check_cluster(replace(settings, database_url=postgres_url)))
    assert (found.level, found.subject) == (Level.OK, "database")
    assert found.text.startswith("postgresql+psycopg://")
