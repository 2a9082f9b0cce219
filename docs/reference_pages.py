"""Writes the pages of docs/reference from the code: settings, API, command line, errors.

``make docs-reference`` runs it, and a test fails when a page differs from what it gives. The site
and the packages do not contain it.
"""

import inspect
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from redux_server.api.app import build_app
from redux_server.api.services import assemble
from redux_server.cli.main import run
from redux_server.database.migration import open_database
from redux_server.errors import ApiError
from redux_server.parameters import MODELS
from redux_server.settings import ClientSettings, ServerSettings, describe
from redux_server.storage.opening import open_pictures
from redux_server.tasks.task import Code, Status

FOLDER = Path(__file__).parent / "reference"
_COLUMNS = "90"  # what fits beside the two sidebars
_WRITTEN = "<!-- Written from the code by `make docs-reference`; do not edit. -->"
_TAGS = {
    "predictions": "Tasks",
    "uploads": "Uploads",
    "webhooks": "Webhooks",
    "models": "Models",
    "account": "Account",
    "service": "Service",
}
_VERB = re.compile(r"^    ([a-z]+) {2,}\S", re.MULTILINE)  # a line of a list of verbs


class Setting(NamedTuple):
    """One setting of ``flux-redux serve``; settings of one ``group`` stand together."""

    group: str
    flag: str
    variable: str
    default: str
    help: str


def settings_rows() -> list[Setting]:
    """Every setting, in the order of ``--help``: the one place that knows how they are declared."""
    client = [
        Setting("For `submit`, `cancel` and `uploads`", *row[1:])
        for row in describe(ClientSettings)
    ]
    return [Setting(*row) for row in describe(ServerSettings)] + client


def pages() -> dict[str, str]:
    """The text of each page by its file name."""
    return {
        "settings.md": settings_page(),
        "api.md": api_page(openapi_document()),
        "cli.md": cli_page(),
        "errors.md": errors_page(),
    }


def main() -> None:
    """Write the pages."""
    for name, text in pages().items():
        (FOLDER / name).write_text(text)


# --- settings -------------------------------------------------------------------------------------


def settings_page() -> str:
    """A table of all settings, one for each group."""
    parts = [
        "Each setting is a flag of `flux-redux serve` and an environment variable. A flag wins "
        "over its variable. An unknown `FLUX_REDUX_*` variable is an error. `flux-redux worker`, "
        "`generate` and the other verbs take those that concern them; see the "
        "[command line](cli.md).",
    ]
    for group, rows in groupby(settings_rows(), key=lambda row: row.group):
        if group:
            parts.append(f"## {group}")
        cells = [
            [f"{_code(row.flag)}<br>{_code(row.variable)}", _code(row.default), _marked(row.help)]
            for row in rows
        ]
        parts.append(table(["flag, variable", "default", ""], cells))
    parts.append(
        "`HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` mean what they mean to huggingface_hub. The "
        "variables of a bucket (`AWS_*`) are under [storage](../deploy/storage-and-disk.md)."
    )
    return page("Settings", parts)


def _marked(help_: str) -> str:
    """A help text with its flags as code."""
    return re.sub(r"(?<![\w`-])--[a-z][a-z-]*", lambda flag: _code(flag[0]), help_)


# --- command line ---------------------------------------------------------------------------------


def cli_page() -> str:
    """The help of ``flux-redux`` and of each verb."""
    parts = [
        "What each verb of `flux-redux` says with `--help`. Exit codes are under "
        "[monitoring](../deploy/monitoring.md#exit-codes).",
    ]
    for verb in [(), *verbs()]:
        parts.append(f"## {' '.join(('flux-redux', *verb))}")
        parts.append(f"```text\n{help_of(verb).strip()}\n```")
    return page("Command line", parts)


def verbs(parent: Sequence[str] = ()) -> Iterator[tuple[str, ...]]:
    """All verbs, each before those below it: ``("keys",)``, ``("keys", "create")``, ..."""
    for name in _VERB.findall(help_of(parent)):
        verb = (*parent, name)
        yield verb
        yield from verbs(verb)


def help_of(verb: Sequence[str]) -> str:
    """What ``flux-redux VERB --help`` prints in a terminal of ``_COLUMNS``."""
    printed = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = _COLUMNS
    try:
        with redirect_stdout(printed), suppress(SystemExit):
            run([*verb, "--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return printed.getvalue()


# --- API ------------------------------------------------------------------------------------------


def openapi_document() -> dict[str, Any]:
    """The OpenAPI document of the app, over an empty data directory."""
    with TemporaryDirectory() as folder:
        settings = ServerSettings(data_dir=Path(folder), model="fake", min_free_disk=0)
        database = open_database(settings.database)
        try:
            return build_app(assemble(settings, database, open_pictures(settings))).openapi()
        finally:
            database.dispose()


def api_page(document: dict[str, Any]) -> str:
    """Every operation by its tag, then the shapes of the answers."""
    parts = [
        "The same is at `/docs` (to try out) and `/openapi.json` of a running server. Paths under "
        "`/api/` need a key: `Authorization: Bearer frs_...`. An answer with status 200 is "
        '`{"code": 200, "message": "success", "data": ...}`, and this page says what `data` is. '
        "[Errors](errors.md) have a body of their own. One path is not in the document: `GET "
        "/files/...` gives an output or an upload, whole or a `Range`.",
        f"The model has {len(MODELS)} names, and tasks can be submitted under each of them: "
        f"{', '.join(f'`{name}`' for name in MODELS)}.",
    ]
    schemas = document["components"]["schemas"]
    for tag, title in _TAGS.items():
        parts.append(f"## {title}")
        for summary, found in _operations(document, tag).items():
            parts += [f"### {summary}", *_operation(found, schemas)]
    parts.append("## Answers")
    for name, schema in schemas.items():
        if not name.endswith("Envelope"):
            parts += [f"### {name}", schema["description"], _fields(schema)]
    return page("API", parts)


def _operations(document: dict[str, Any], tag: str) -> dict[str, list[tuple[str, Any]]]:
    """``METHOD path`` and operation of each operation of ``tag``, by summary."""
    found: dict[str, list[tuple[str, Any]]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if operation["tags"] == [tag]:
                line = f"{method.upper()} {path.replace('{task_id}', '{id}')}"
                found.setdefault(operation["summary"], []).append((line, operation))
    return found


def _operation(found: Sequence[tuple[str, Any]], schemas: dict[str, Any]) -> Iterator[str]:
    """What is said of operations that differ in their paths only."""
    operation = found[0][1]
    yield "\n".join(("```text", *(line for line, _ in found), "```"))
    if "description" in operation:
        yield operation["description"]
    rows = [
        [_code(each["name"]), each["in"], _kind(each["schema"]), each["description"]]
        for each in operation.get("parameters", ())
        if each["in"] != "path"
    ]
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        where = "form" if "form" in media else "body"
        schema = content["schema"]
        required = schema.get("required", ())
        for name, field in schema.get("properties", {}).items():
            rows.append([_code(name), where, _kind(field, name in required), _words(field)])
        if not schema.get("properties"):
            yield f"The body is the file (`{media}`)."
    if rows:
        yield table(["parameter", "in", "type", ""], rows)
    yield _answers(operation["responses"], schemas)


def _answers(responses: dict[str, Any], schemas: dict[str, Any]) -> str:
    """The good answer and what else may come."""
    content = responses["200"].get("content", {})
    names = {
        each["schema"]["$ref"].rpartition("/")[2]
        for each in content.values()
        if "$ref" in each.get("schema", {})
    }
    data = [schemas[name]["properties"]["data"] if "Envelope" in name else None for name in names]
    shapes = [_kind(each) for each in data if each] or [_link(n) for n in names if n in schemas]
    text = f"Answer: {responses['200']['description'].rstrip('.')}"
    text += f" ({', '.join(shapes)})." if shapes else "."
    others = sorted(status for status in responses if status != "200")
    return f"{text} Other statuses: {', '.join(others)}." if others else text


def _fields(schema: dict[str, Any]) -> str:
    rows = [
        [_code(name), _kind(field), _words(field)] for name, field in schema["properties"].items()
    ]
    return table(["field", "type", ""], rows)


def _kind(schema: dict[str, Any], is_required: bool = False) -> str:
    """A field's type, its range and its default, in words."""
    schema = _without_null(schema)
    if "$ref" in schema:
        return _link(schema["$ref"].rpartition("/")[2])
    if schema.get("type") == "array":
        words = f"array of {_kind(schema.get('items', {}))}"
    elif "enum" in schema:
        words = "one of " + ", ".join(_code(each) for each in schema["enum"])
    else:
        kinds = schema.get("type", "any")
        words = kinds if isinstance(kinds, str) else " or ".join(kinds)
    low, high = (schema.get(bound) for bound in ("minimum", "maximum"))
    if low is not None and high is not None:
        words += f", {low:.10g} to {high:.10g}"
    if is_required:
        words += ", required"
    default = schema.get("default")
    if default not in (None, "", []):
        words += f", default {_code(str(default).lower() if default in (True, False) else default)}"
    return words


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The one kind that a field has beside null."""
    kinds = [each for each in schema.get("anyOf", ()) if each != {"type": "null"}]
    return {**schema, **kinds[0]} if len(kinds) == 1 else schema


def _words(schema: dict[str, Any]) -> str:
    return str(schema.get("description", ""))


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


# --- errors ---------------------------------------------------------------------------------------


def errors_page() -> str:
    """The statuses of refused requests, and how tasks end."""
    errors = [[str(each.status), _code(each.name), _summary(each)] for each in _subclasses()]
    return page(
        "Errors",
        [
            "## Refused requests",
            "A refused request has one of these statuses, and a body in which every client finds "
            'its text: `{"code": 429, "message": "...", "error": "...", "error_code": '
            '"queue_full", "data": null}`. `message` and `error` are the same text: what was '
            "given, what is allowed, what to do. A 429, and a 503 that is worth another try, has "
            "`Retry-After`.",
            table(["status", "`error_code`", ""], errors),
            "Some requests are refused before they reach the API. Unknown paths (404), wrong "
            "methods (405) and requests that are no valid HTTP (400) have the `error_code` "
            "`http_error`. A URL (414) or a head (431) that is too large has `too_large`, and a "
            "body that ends early (400) has `incomplete_body`. A 500 with `internal_error` is a "
            "fault of the server; its log says more.",
            "## Task states",
            "A task's `status` only ever moves down this list; the last three are ends.",
            table(["`status`", ""], _commented(Status)),
            "## Task codes",
            "A task's `code` says why it has failed, in the numbers of the hosted service's table.",
            table(["`code`", ""], _commented(Code)),
        ],
    )


def _subclasses() -> list[type[ApiError]]:
    """The errors of the API in the order in which they are declared."""
    found = ApiError.__subclasses__()
    return [each for each in found if each.__module__ == ApiError.__module__]


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").split("\n")[0]


def _commented(cls: type) -> list[list[str]]:
    """Each constant of ``cls`` and the comment behind it."""
    lines = re.findall(r"^    ([A-Z_]+) = .+?  # (.+)$", inspect.getsource(cls), re.MULTILINE)
    return [[_code(_value(getattr(cls, name))), comment] for name, comment in lines]


def _value(constant: Any) -> Any:
    return getattr(constant, "value", constant)


# --- Markdown -------------------------------------------------------------------------------------


def page(title: str, parts: Iterable[str]) -> str:
    """A page of paragraphs, marked as written."""
    return "\n\n".join([f"# {title}", _WRITTEN, *parts]) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """One line a row."""
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in cells)


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", r"\|")


def _code(value: Any) -> str:
    return f"`{value}`" if str(value) else ""


if __name__ == "__main__":
    main()
