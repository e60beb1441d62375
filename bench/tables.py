"""Markdown: headings, tables, images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def heading(text: str, level: int = 2) -> str:
    return f"\n{'#' * level} {text}\n\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns after the first are right-aligned where all their cells are figures."""
    body = [[_cell(value) for value in row] for row in rows]
    lines = [list(columns), [_rule(i, body) for i in range(len(columns))], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def image(drawn: Mapping[str, str], name: str) -> str:
    """The plot of that name, if it was drawn."""
    return f"![{name}]({drawn[name]})\n" if name in drawn else ""


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


def _rule(column: int, body: Sequence[Sequence[str]]) -> str:
    cells = [row[column] for row in body if row[column] != "-"]
    figures = column > 0 and cells and all(cell[:1].isdigit() for cell in cells)
    return "---:" if figures else "---"
