"""What the commands share: tables, and errors in the words that the user typed."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rich.table import Column, Table
from rich.text import Text


def table(
    *headers: str, title: str | None = None, right: tuple[int, ...] = (), show_header: bool = True
) -> Table:
    """A table with a column for each header; those numbered in `right` are adjusted that way.

    In a terminal too narrow for it cells go on in the next line: nothing is cut off.
    """
    columns = [
        Column(header, overflow="fold", justify="right" if number in right else "left")
        for number, header in enumerate(headers)
    ]
    # Not as markup: what the system says may have brackets.
    heading = None if title is None else Text(title)
    return Table(*columns, title=heading, show_header=show_header)


def in_options(message: str, options: Mapping[str, str]) -> str:
    """An error about arguments, with the names of the options that gave them.

    `options[argument]`: the option. Errors begin with the argument, and of others only what is no
    word of English is taken for a name ("path" is one).
    """

    def name(match: re.Match[str]) -> str:
        argument = match[0]
        leads = match.start() == 0 and message.startswith(f"{argument}:")
        return options.get(argument, argument) if leads or "_" in argument else argument

    return re.sub(r"\w+", name, message)
