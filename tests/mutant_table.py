"""Writes the table of mutants into tests/README.md; with names, prints how these are reported.

`python tests/mutant_table.py [NAME ...]`
"""

from __future__ import annotations

import sys
from pathlib import Path

from mutants import MUTANTS, catch

README = Path(__file__).parent / "README.md"
HEAD = "| mutant | rule | caught by | seeds |\n| --- | --- | --- | --- |\n"


def rows() -> str:
    lines = []
    for mutant in MUTANTS.values():
        caught = catch(mutant)
        if caught is None:
            raise SystemExit(f"not caught: {mutant.name}")
        lines.append(f"| {mutant.name} | {mutant.rule} | {caught.how} | {caught.seed + 1} |\n")
    return "".join(lines)


def names() -> list[str]:
    """The mutants in the table of the file."""
    table = README.read_text().partition(HEAD)[2]
    return [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]


def main(chosen: list[str]) -> None:
    for name in chosen:
        caught = catch(MUTANTS[name])
        if caught is None:
            raise SystemExit(f"not caught: {name}")
        print(f"{name}: seed {caught.seed}, {caught.how}")
        print(caught.report)
    if not chosen:
        before, _, _ = README.read_text().partition(HEAD)
        README.write_text(before + HEAD + rows())


if __name__ == "__main__":
    main(sys.argv[1:])
