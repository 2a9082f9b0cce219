"""The README says what the code says."""

import re
from pathlib import Path

from redux_server.api.routes import account, cancel, lists, models, predictions, stream
from redux_server.parameters import PredictionRequest
from redux_server.settings import ServerSettings, describe

README = (Path(__file__).parents[2] / "README.md").read_text()


def settings_table() -> str:
    rows = ["| flag | variable | default | |", "|---|---|---|---|"]
    for _, flag, variable, default, help_ in describe(ServerSettings):
        shown = f"`{default}`" if default else ""
        rows.append(f"| `{flag}` | `{variable}` | {shown} | {help_} |")
    return "\n".join(rows)


def test_settings_table_is_that_of_the_code() -> None:
    found = re.search(r"<!-- settings: .*? -->\n(.*?)\n<!-- /settings -->", README, re.DOTALL)
    assert found is not None
    assert found[1] == settings_table(), f"put this table into README.md:\n{settings_table()}"


def test_every_parameter_and_its_default_is_in_the_readme() -> None:
    for name, field in PredictionRequest.model_fields.items():
        row = re.search(rf"^\| `{name}` \| (.*?) \|", README, re.MULTILINE)
        assert row is not None, name
        if not field.is_required() and field.default is not None and name != "seed":
            default = field.default
            text = str(default).lower() if isinstance(default, bool) else str(default)
            assert text in row[1].replace('""', ""), name


def test_every_task_path_is_in_the_readme() -> None:
    modules = (predictions, cancel, lists, stream, models, account)
    for route in (each for module in modules for each in module.router.routes):
        path = route.path.replace("{task_id}", "{id}")
        if path.startswith("/api/") and "{path" not in path:
            assert path in README or path.rsplit("/", 1)[1] in README, path
