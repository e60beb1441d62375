"""Reads the tables that a command printed in a terminal, however narrow."""

from __future__ import annotations

import re


def columns(text: str) -> list[list[str]]:
    """Of each table its columns from top to bottom, without spaces: where a cell goes on in the
    next line, that follows."""
    tables: list[list[str]] = []
    for line in text.splitlines():
        if line[:1] in "┏┌" and line:
            tables.append([])
        elif line[:1] in "┃│" and line:
            parts = [re.sub(r"\s", "", part) for part in re.split("[┃│]", line)[1:-1]]
            seen = tables[-1] or [""] * len(parts)
            tables[-1] = [above + part for above, part in zip(seen, parts, strict=True)]
    return tables


def without_spaces(*texts: str) -> str:
    return re.sub(r"\s", "", "".join(texts))
