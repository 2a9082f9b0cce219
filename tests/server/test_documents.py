"""The pages about the server say what the code says."""

import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.metrics import MetricWrapperBase

import reference_pages
from redux_server import metrics
from redux_server.api.routes import account, cancel, lists, models, predictions, stream
from redux_server.errors import ApiError
from redux_server.parameters import PredictionRequest
from redux_server.settings import ClientSettings, ServerSettings, environment_name, flag_name
from redux_server.tasks.task import Code
from server.in_process import Api

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
REQUESTS = (ROOT / "docs/guide/requests.md").read_text()
MONITORING = (ROOT / "docs/deploy/monitoring.md").read_text()
REFERENCE = {path.name: path.read_text() for path in (ROOT / "docs/reference").glob("*.md")}


def task_paths() -> list[str]:
    modules = (predictions, cancel, lists, stream, models, account)
    found = [route.path for module in modules for route in module.router.routes]
    paths = [path.replace("{task_id}", "{id}") for path in found]
    return [path for path in paths if path.startswith("/api/") and "{path" not in path]


# --- pages that are written from the code ---------------------------------------------------------


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    return reference_pages.pages()


@pytest.mark.parametrize("name", ["settings.md", "api.md", "errors.md"])
def test_reference_is_what_the_code_gives(written: dict[str, str], name: str) -> None:
    assert REFERENCE[name] == written[name], "run `make docs-reference`"


def test_command_line_reference_is_what_the_code_gives(written: dict[str, str]) -> None:
    assert words(REFERENCE["cli.md"]) == words(written["cli.md"]), "run `make docs-reference`"


def test_no_other_page_claims_to_be_written(written: dict[str, str]) -> None:
    assert set(REFERENCE) == set(written)


def words(help_: str) -> list[str]:
    """A help text without its line breaks and as Python 3.13 shows short flags: ``-o, --out DIR``.

    Older ones write ``-o DIR, --out DIR``.
    """
    return re.sub(r"(-\w) (\S+), (--[\w-]+) \2", r"\1, \3 \2", help_).split()


def test_words_are_the_same_whichever_python_wrote_them() -> None:
    assert words("  -o DIR, --out DIR\n   where") == words("  -o, --out DIR   where")
    assert words("  -o DIR, --out DIR") != words("  -o FILE, --out FILE")


def test_every_setting_is_in_its_reference() -> None:
    names = [*ServerSettings.__dataclass_fields__, *ClientSettings.__dataclass_fields__]
    for name in names:
        row = f"| `{flag_name(name)}`<br>`{environment_name(name)}` |"
        assert REFERENCE["settings.md"].count(row) == 1, name


@pytest.mark.parametrize("verb", ["serve", "worker", "keys create", "db upgrade", "doctor"])
def test_command_line_reference_has_verbs_and_those_below_them(verb: str) -> None:
    assert f"\n## flux-redux {verb}\n" in REFERENCE["cli.md"]
    assert f"usage: flux-redux {verb} " in REFERENCE["cli.md"]


def test_every_task_path_is_in_the_reference_and_in_the_readme() -> None:
    lines = re.findall(r"^[A-Z]+ (/\S+)$", REFERENCE["api.md"], re.MULTILINE)
    for path in task_paths():
        model = re.fullmatch(r"/api/v[23]/(wavespeed-ai/[\w-]+)", path)
        assert path in lines or (model and f"`{model[1]}`" in REFERENCE["api.md"]), path
        assert path in README or path.rsplit("/", 1)[1] in README, path


def test_every_error_and_every_task_code_is_in_the_reference() -> None:
    for error in ApiError.__subclasses__():
        assert f"| {error.status} | `{error.name}` |" in REFERENCE["errors.md"], error
    for name, code in vars(Code).items():
        if name.isupper():
            assert f"| `{code}` |" in REFERENCE["errors.md"], name


def test_refusals_have_documented_names(api: Api) -> None:
    submit = "/api/v3/wavespeed-ai/flux-pro-redux"
    answers = [
        api.get("/api/v3/predictions/x", key=""),
        api.get("/nowhere"),
        api.request("DELETE", submit),
        api.post(submit, json={}),
        api.get(f"/api/v3/predictions/{'0' * 32}"),
    ]
    for answer in answers:
        assert answer.status_code >= 400
        assert f"`{answer.json()['error_code']}`" in REFERENCE["errors.md"]


# --- pages written by hand ------------------------------------------------------------------------


def test_every_parameter_and_its_default_is_in_the_guide() -> None:
    for name, field in PredictionRequest.model_fields.items():
        row = re.search(rf"^\| `{name}` \| (.*?) \|", REQUESTS, re.MULTILINE)
        assert row is not None, name
        if not field.is_required() and field.default is not None and name != "seed":
            default = field.default
            text = str(default).lower() if isinstance(default, bool) else str(default)
            assert text in row[1].replace('""', ""), name


def test_no_parameter_is_in_the_guide_that_there_is_not() -> None:
    names = re.findall(r"^\| `(\w+)` \|", REQUESTS, re.MULTILINE)
    assert set(names) == set(PredictionRequest.model_fields)


def shown_names(metric: Any) -> list[str]:
    """Under which names a metric is scraped."""
    total = "_total" if metric._type == "counter" else ""
    return [f"{found.name}{total}" for found in metric.describe()]


def test_every_metric_is_under_monitoring_and_no_other(api: Api) -> None:
    counted = [each for each in vars(metrics).values() if isinstance(each, MetricWrapperBase)]
    read = re.findall(r"^# TYPE (flux_redux_\w+) gauge", api.get("/metrics").text, re.MULTILINE)
    there_are = {name for metric in counted for name in shown_names(metric)} | set(read)
    table = re.findall(r"^\| (`flux_redux_.+?) \|", MONITORING, re.MULTILINE)
    named = re.findall(r"`(flux_redux_\w+)`", " ".join(table))
    assert set(named) == there_are
    assert len(named) == len(set(named))


def test_labels_under_monitoring_are_those_of_the_metrics() -> None:
    counted = [each for each in vars(metrics).values() if isinstance(each, MetricWrapperBase)]
    for metric in counted:
        (name,) = shown_names(metric)
        row = re.search(rf"^\| [^|]*`{name}`[^|]*\| (.*?) ?\|", MONITORING, re.MULTILINE)
        assert row is not None, name
        assert re.findall(r"`(\w+)`", row[1]) == list(metric._labelnames), name
