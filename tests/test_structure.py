"""docs/internals/structure.md is true: the rooms, their order, and the ways through the code."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/internals/structure.md").read_text()
PACKAGES = {
    "redux_server": ROOT / "server/redux_server",
    "redux_pipelines": ROOT / "pipelines/redux_pipelines",
}
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
    "contracts"
]
_STEP = re.compile(r"^ *([\w/]+\.py): ([\w.]+)", re.MULTILINE)


def section(title: str) -> str:
    """The text under a heading of the page."""
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def title(package: str) -> str:
    return f"The rooms of `{package}`"


def layers(package: str) -> list[set[str]]:
    """The order of rooms that import-linter holds, from the top."""
    [contract] = [each for each in CONTRACTS if each["name"] == f"rooms of {package}"]
    return [set(re.split(r"[|:\s]+", line)) for line in contract["layers"]]


def rooms(package: str) -> dict[str, set[str]]:
    """The page's table: the modules of each room, and those at the top of the package."""
    rows = re.findall(r"^\| (`\w+`|\(top\)) \| .*? \| (`.+?) \|$", section(title(package)), re.M)
    return {name.strip("`"): set(re.findall(r"`([\w/]+)`", text)) for name, text in rows}


def modules(folder: Path) -> set[str]:
    """What a folder holds: its modules, and folders of modules with a slash behind them."""
    files = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")}
    return files | {f"{path.parent.name}/" for path in folder.glob("*/*.py")}


def is_defined(file: Path, name: str) -> bool:
    """Whether a module defines a function or class, or a class of it such a method."""
    body: list[ast.stmt] = ast.parse(file.read_text()).body
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        found = [node for node in body if isinstance(node, kinds) and node.name == part]
        if not found:
            return False
        body = found[0].body
    return True


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_hold_the_modules_that_the_page_names(package: str) -> None:
    folder, shown = PACKAGES[package], rooms(package)
    top = shown.pop("(top)")
    assert shown == {name: modules(folder / name) for name in shown}
    assert top == {path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")}
    assert set(shown) | top == set().union(*layers(package))


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_stand_in_the_order_that_is_checked(package: str) -> None:
    rule = re.search(r"```\n(.+?)```", section(title(package)), re.DOTALL)
    assert rule is not None
    lines = [set(re.split(r"[|,\s]+", part.strip())) for part in rule[1].split(">")]
    assert lines == layers(package)


@pytest.mark.parametrize("title", ["The way of a request", "The way of a tensor"])
def test_ways_name_functions_that_are_there(title: str) -> None:
    steps = _STEP.findall(section(title))
    assert len(steps) > 15
    for place, name in steps:
        files = [folder / place for folder in PACKAGES.values() if (folder / place).exists()]
        assert files, f"{place} is in neither package"
        assert any(is_defined(file, name) for file in files), f"{place} has no {name}"


def test_a_wrong_name_would_be_seen() -> None:
    file = PACKAGES["redux_server"] / "tasks/store.py"
    assert is_defined(file, "TaskStore.accept")
    assert not is_defined(file, "TaskStore.swallow")
    assert not is_defined(file, "accept")
