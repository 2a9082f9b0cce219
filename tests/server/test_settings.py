"""Flags, variables and defaults, and what is refused."""

import argparse
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from redux_server.settings import (
    GROUPS,
    ClientSettings,
    ModelSettings,
    ServerSettings,
    UsageError,
    add_flags,
    build,
    default_data_dir,
    describe,
    environment_name,
    flag_name,
    to_environment,
)

# A value other than the default for each setting, as it is written in a shell.
OTHERS = {
    "model": "tiny",
    "base": "/weights/base",
    "redux": "/weights/redux",
    "revision": "abc",
    "backend": "diffusers",
    "device": "cuda:0,cuda:1",
    "dtype": "float16",
    "transformer_dtype": "fp8",
    "attention": "cudnn,triton",
    "quality": "fast",
    "max_batch_size": "4",
    "batch_timeout": "250",
    "compile": "full",
    "cuda_graphs": "3",
    "warm_sizes": "512x512,1024*768",
    "memory": "offload",
    "parallel": "2",
    "host": "::1",
    "port": "0",
    "cors_origins": "https://app.example,http://localhost:3000",
    "public_url": "https://flux.example",
    "trusted_proxies": "10.0.0.0/8",
    "keep_alive_s": "620",
    "playground": "off",
    "data_dir": "/srv/flux",
    "blob_url": "s3://pictures/flux",
    "min_free_disk": "64",
    "database_url": "postgresql://flux:secret@db/flux",
    "dispatch": "celery",
    "broker_url": "amqp://guest:secret@mq//",
    "metrics_port": "9100",
    "api_keys_file": "/etc/keys",
    "max_queue": "7",
    "max_upload": "9",
    "max_image_pixels": "50000000",
    "upload_retention_hours": "24",
    "sync_timeout_s": "30",
    "max_open_per_key": "4",
    "queue_share": "50",
    "max_stored_uploads": "3",
    "max_stored_tasks": "5",
    "disk_share": "30",
    "rate_limit": "5",
    "max_attempts": "2",
    "lease_s": "12.5",
    "drain_timeout_s": "0",
    "retention_hours": "1",
    "force_safety_checker": "true",
    "safety_threshold": "0.5",
    "fetch_allow": "10.0.0.0/8",
    "webhook_allow": "hooks.lan",
    "webhook_signature": "both",
    "webhook_timeout_s": "90",
    "log_format": "text",
    "step_timeout_s": "90.5",
    "log_level": "debug",
    "url": "http://flux:8000",
    "key": "frs_x",
}
FIELDS = [(cls, f.name) for cls in (ServerSettings, ClientSettings) for f in fields(cls)]


def parse(cls: Any, *arguments: str, **environ: str) -> Any:
    parser = argparse.ArgumentParser()
    add_flags(parser, cls)
    return build(cls, vars(parser.parse_args(arguments)), environ)


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=[name for _, name in FIELDS])
def test_flag_and_variable_mean_the_same(cls: Any, name: str) -> None:
    by_variable = parse(cls, **{environment_name(name): OTHERS[name]})
    is_switch = OTHERS[name] == "true"
    arguments = [flag_name(name)] if is_switch else [flag_name(name), OTHERS[name]]
    assert getattr(by_variable, name) != getattr(parse(cls), name)
    assert parse(cls, *arguments) == by_variable


def test_flags_win_over_the_environment() -> None:
    settings = parse(ServerSettings, "--port", "9000", FLUX_REDUX_PORT="9001")
    assert settings.port == 9000


def test_a_switch_can_be_turned_off_against_the_environment() -> None:
    name = "FLUX_REDUX_FORCE_SAFETY_CHECKER"
    assert parse(ServerSettings, **{name: "yes"}).force_safety_checker
    assert not parse(
        ServerSettings, "--no-force-safety-checker", **{name: "yes"}
    ).force_safety_checker


def test_the_older_name_of_dispatch_means_the_same() -> None:
    by_its_name = parse(ServerSettings, "--dispatch", "sql")
    assert by_its_name.dispatch == "sql"
    assert parse(ServerSettings, "--engine", "sql") == by_its_name
    assert parse(ServerSettings, FLUX_REDUX_ENGINE="sql") == by_its_name
    assert parse(ServerSettings, FLUX_REDUX_DISPATCH="sql", FLUX_REDUX_ENGINE="sql") == by_its_name
    assert parse(ServerSettings, "--engine", "sql", FLUX_REDUX_DISPATCH="celery") == by_its_name
    assert parse(ServerSettings, "--dispatch", "sql", FLUX_REDUX_ENGINE="celery") == by_its_name


def test_two_names_of_one_setting_may_not_contradict_each_other() -> None:
    with pytest.raises(UsageError, match="--dispatch sql and --engine local contradict"):
        parse(ServerSettings, "--engine", "local", "--dispatch", "sql")
    with pytest.raises(UsageError, match="FLUX_REDUX_DISPATCH sql and FLUX_REDUX_ENGINE local"):
        parse(ServerSettings, FLUX_REDUX_ENGINE="local", FLUX_REDUX_DISPATCH="sql")


def test_a_mistake_under_the_older_name_is_told_under_it() -> None:
    with pytest.raises(UsageError, match=r"^--engine must be one of local, sql, celery, got 'mq'"):
        parse(ServerSettings, "--engine", "mq")
    with pytest.raises(UsageError, match=r"^FLUX_REDUX_ENGINE must be one of local"):
        parse(ServerSettings, FLUX_REDUX_ENGINE="mq")


def test_a_child_is_not_contradicted_by_an_older_name_that_it_inherits() -> None:
    settings = parse(ServerSettings, "--dispatch", "local", FLUX_REDUX_ENGINE="celery")
    inherited = {"FLUX_REDUX_ENGINE": "celery", **to_environment(settings)}
    assert build(ServerSettings, {}, inherited) == settings


def test_secrets_are_not_shown() -> None:
    names = ("database_url", "broker_url", "key")
    for cls, name in ((cls, name) for cls, name in FIELDS if name in names):
        settings = parse(cls, **{environment_name(name): "hunter2"})
        assert getattr(settings, name) == "hunter2"
        assert "hunter2" not in repr(settings)


def test_an_empty_variable_is_not_set() -> None:
    assert parse(ServerSettings, FLUX_REDUX_PORT="").port == 8000


def test_an_unknown_variable_of_ours_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"FLUX_REDUX_PROT; known are .*FLUX_REDUX_PORT"):
        parse(ServerSettings, FLUX_REDUX_PROT="1", OTHER="x")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("FLUX_REDUX_MAXQUEUE", "FLUX_REDUX_MAX_QUEUE"),
        ("FLUX_REDUX_MAX_QUEUES", "FLUX_REDUX_MAX_QUEUE"),
        ("FLUX_REDUX_DATADIR", "FLUX_REDUX_DATA_DIR"),
        ("FLUX_REDUX_DATABASE", "FLUX_REDUX_DATABASE_URL"),
        ("FLUX_REDUX_PUBLICURL", "FLUX_REDUX_PUBLIC_URL"),
        ("FLUX_REDUX_prot", "FLUX_REDUX_PORT"),
        ("FLUX_REDUX_CORS_ORIGIN", "FLUX_REDUX_CORS_ORIGINS"),
    ],
)
def test_the_nearest_variable_is_named(typed: str, meant: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse(ServerSettings, **{typed: "1"})
    assert str(raised.value).endswith(f"; {typed} is perhaps {meant}")


def test_no_variable_is_named_where_none_is_near() -> None:
    with pytest.raises(UsageError, match=r"variable FLUX_REDUX_ZZZZ; known are") as raised:
        parse(ServerSettings, FLUX_REDUX_ZZZZ="1")
    assert "perhaps" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://gpu.example.com",
        "http://127.0.0.1:8000",
        "https://gpu.example.com/flux/",
        "https://[2001:db8::1]:8443/a",
        "http://gpu_box:65535",
        "https://xn--bcher-kva.example",
        "HTTPS://GPU.example.com",
    ],
)
def test_public_url_that_can_be_joined_is_taken(url: str) -> None:
    assert parse(ServerSettings, "--public-url", url).public_url == url


@pytest.mark.parametrize(
    "url",
    [
        *("gpu.example.com", "//gpu.example.com", "gpu.example.com:8000", "localhost:8000"),
        *("ftp://gpu.example.com", "https://", "https:///x", "https:gpu.example.com", "https//x"),
        *("https://gpu.example.com/flux?x=1", "https://gpu.example.com?", "https://h#x"),
        *("https://me:secret@gpu.example.com", "https://me@gpu.example.com"),
        *("https://gpu example.com", "https://gpu.example.com/a b", "https://gpu.example.com\n"),
        *(
            "https://h:99999",
            "https://h:65536",
            "https://h:port",
            "https://h:80:80",
            "https://[::1",
        ),
        *("https://h\\x", "https://h/\\x", "javascript:alert(1)", "https://-"),
    ],
)
def test_public_url_of_no_use_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"^--public-url must be .*http\(s\) URL"):
        parse(ServerSettings, "--public-url", url)


def test_the_variables_of_all_verbs_are_known_to_each() -> None:
    assert parse(ServerSettings, FLUX_REDUX_KEY="frs_x", FLUX_REDUX_URL="http://x").port == 8000
    assert parse(ClientSettings, FLUX_REDUX_PORT="9000").key == ""


def test_what_kubernetes_sets_for_a_service_named_flux_redux_is_ignored() -> None:
    links = {
        "FLUX_REDUX_SERVICE_HOST": "10.0.0.7",
        "FLUX_REDUX_SERVICE_PORT": "8000",
        "FLUX_REDUX_SERVICE_PORT_HTTP": "8000",
        "FLUX_REDUX_PORT": "tcp://10.0.0.7:8000",
        "FLUX_REDUX_PORT_8000_TCP": "tcp://10.0.0.7:8000",
        "FLUX_REDUX_PORT_8000_TCP_ADDR": "10.0.0.7",
        "FLUX_REDUX_METRICS_PORT": "tcp://10.0.0.8:9000",
        "FLUX_REDUX_METRICS_SERVICE_HOST": "10.0.0.8",
    }
    assert parse(ServerSettings, **links).port == 8000


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("port", "http", "must be a whole number, got 'http'"),
        ("port", "-1", "must be at least 0"),
        ("port", "65536", "must be at most 65535"),
        ("lease_s", "soon", "must be a number"),
        ("lease_s", "0.5", "must be at least 1"),
        ("lease_s", "nan", "must be a number"),
        ("retention_hours", "inf", "must be a number"),
        ("safety_threshold", "0", "must be at least 0.01"),
        ("safety_threshold", "1.5", "must be at most 1"),
        ("model", "flux", "must be one of mini, flux-dev, flux-schnell, tiny, fake"),
        ("dtype", "fp8", "must be one of auto, float32"),
        ("quality", "best", "must be one of exact, balanced, fast"),
        ("parallel", "3", "must be one of 1, 2, 4"),
        ("device", "gpu", "must be auto"),
        ("attention", "cuddn", "must be auto (the first that passes its self-test"),
        ("attention", "cudnn,auto", "must be auto"),
        ("device", "cuda:0,", "must be auto"),
        ("device", "cpu,cuda:0", "must be auto"),
        ("force_safety_checker", "perhaps", "must be true or false"),
        ("data_dir", "~nobody-of-this-name/x", "must be a path"),
    ],
)
def test_a_value_of_no_use_is_refused_with_what_is_allowed(
    name: str, text: str, complaint: str
) -> None:
    with pytest.raises(UsageError) as by_variable:
        parse(ServerSettings, **{environment_name(name): text})
    assert str(by_variable.value).startswith(f"{environment_name(name)} {complaint}")


def test_a_refused_flag_is_named_as_a_flag() -> None:
    with pytest.raises(UsageError, match=r"--device must be auto .*; got ''"):
        parse(ServerSettings, "--device", "")


def test_an_empty_data_dir_is_not_the_current_folder() -> None:
    with pytest.raises(UsageError, match="--data-dir must be a path"):
        parse(ServerSettings, "--data-dir", "")


def test_data_dir_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / "flux-redux"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse(ServerSettings).data_dir == tmp_path / ".local" / "share" / "flux-redux"


def test_without_a_home_the_data_dir_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UsageError, match="give --data-dir"):
        parse(ServerSettings)
    assert parse(ServerSettings, "--data-dir", "/srv/flux").data_dir == Path("/srv/flux")


def test_data_dir_is_absolute_and_knows_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert parse(ServerSettings, "--data-dir", "here").data_dir == tmp_path / "here"
    assert parse(ServerSettings, "--data-dir", "~/there").data_dir == tmp_path / "there"


def test_a_child_builds_the_very_same_settings() -> None:
    names = {f.name for f in fields(ServerSettings)}
    environ = {environment_name(name): OTHERS[name] for name in names}
    for settings in (parse(ServerSettings), parse(ServerSettings, **environ)):
        assert build(ServerSettings, {}, to_environment(settings)) == settings


def test_the_database_and_the_pictures_are_in_the_data_dir() -> None:
    settings = parse(ServerSettings, "--data-dir", "/srv/flux")
    assert settings.database == "sqlite:////srv/flux/tasks.db"
    assert settings.blobs_dir == Path("/srv/flux/blobs")


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("", False)],
)
def test_loopback_is_what_only_this_machine_reaches(host: str, is_loopback: bool) -> None:
    assert parse(ServerSettings, "--host", host).is_loopback is is_loopback


def test_the_table_of_the_readme_has_a_row_per_setting_and_no_path_of_this_machine() -> None:
    rows = describe(ServerSettings)
    assert sorted(row[1] for row in rows) == sorted(
        flag_name(f.name) for f in fields(ServerSettings)
    )
    assert ("Most used", "--port", "FLUX_REDUX_PORT", "8000") in [row[:4] for row in rows]
    shown = {flag: default for _, flag, _, default, _ in rows}
    assert shown["--data-dir"] == "~/.local/share/flux-redux"
    assert all(help_ for *_, help_ in rows)


def test_rows_come_by_group_and_each_group_once() -> None:
    titles = [title for title, _ in groupby(row[0] for row in describe(ServerSettings))]
    assert titles[0] == "Most used"
    assert titles == [title for title in GROUPS if title != "Connection"]
    assert {row[0] for row in describe(ClientSettings)} == {"Connection"}


def test_every_setting_is_in_one_group_and_ten_are_most_used() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(name for _, name in FIELDS)
    assert len(GROUPS["Most used"]) == 10


def test_the_model_settings_are_those_of_the_server() -> None:
    server = {f.name: f.default for f in fields(ServerSettings)}
    assert {f.name: f.default for f in fields(ModelSettings)}.items() <= server.items()
