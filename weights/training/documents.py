"""Figures in Markdown: tables, and their places between the marks of a document.

Knows nothing of what was measured.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """One line for the head, its rule, and one a row."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def has_place(document: Path, name: str) -> bool:
    """Whether there is just one ``<!-- figures: name -->`` with an end behind it."""
    return len(_place(name).findall(document.read_text())) == 1


def place_figures(document: Path, name: str, text: str) -> None:
    """Put ``text`` between the marks of ``name``. Raises ``ValueError`` without just one place."""
    if not has_place(document, name):
        raise ValueError(f"{document} has no place for figures: {name}")
    written = _place(name).sub(lambda marks: marks[1] + text + marks[2], document.read_text())
    document.write_text(written)


def _place(name: str) -> re.Pattern[str]:
    start = re.escape(f"<!-- figures: {name} -->\n")
    return re.compile(f"({start}).*?(<!-- /figures -->)", re.DOTALL)
