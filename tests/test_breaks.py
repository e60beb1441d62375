"""The list of breaks is as it should be; `python tests/breaks.py` runs them."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from breaks import ROOT, Break, read_breaks, verdict

FILES = read_breaks()
BREAKS = [each for entries in FILES.values() for each in entries]


@cache
def defined_in(file: str) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse((ROOT / file).read_text()))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def wrong_with(each: Break) -> str | None:
    try:
        broken = each.broken((ROOT / each.file).read_text())
        if each.file.endswith(".py"):  # a compiler looks at the others
            ast.parse(broken)
    except (ValueError, SyntaxError) as error:
        return f"{each.name}: {error!r}"
    for test in each.caught_by:
        file, *names = test.split("::")
        if not {name.partition("[")[0] for name in names} <= defined_in(file):
            return f"{each.name}: no such test {test}"
    return None


@pytest.mark.parametrize("name", FILES)
def test_every_break_is_still_one(name):
    wrong = [why for each in FILES[name] if (why := wrong_with(each)) is not None]
    assert not wrong


def test_what_is_wrong_with_a_break_is_said():
    good = BREAKS[0]
    assert wrong_with(good) is None
    assert "expected its text once" in wrong_with(replace(good, was="nowhere to be found"))
    assert "SyntaxError" in wrong_with(replace(good, becomes=f"{good.was} ("))
    assert "no such test" in wrong_with(replace(good, caught_by=("tests/test_breaks.py::no",)))


def test_no_two_breaks_have_one_name():
    twice = [name for name, count in Counter(each.name for each in BREAKS).items() if count > 1]
    assert not twice


def test_what_is_not_there_is_no_break():
    with pytest.raises(ValueError, match="got 2"):
        Break("twice", "a.py", "x", "y", ("tests/test_a.py",)).broken("x = x")
    with pytest.raises(ValueError, match="changes nothing"):
        Break("same", "a.py", "x", "x", ("tests/test_a.py",)).broken("x = 1")


@pytest.mark.parametrize(
    ("status", "noticed"), [(None, True), (9, True), (1 << 8, True), (0, False), (2 << 8, False)]
)
def test_only_a_test_that_fails_notices(status, noticed):
    assert verdict(status)[0] is noticed


def test_each_break_names_a_file_of_the_project():
    files = {each.file for each in BREAKS}
    assert all(name.startswith(("triton_offload/", "kernels/")) for name in files)
    assert all(Path(ROOT / name).is_file() for name in files)


def statements(file: Path) -> int:
    """How many statements the file's functions have: declarations and docstrings are none. Of C,
    where there is more than one, they are not counted."""
    if file.suffix == ".c":
        return 100
    functions = [
        node
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return sum(
        not (isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant))
        for function in functions
        for inner in function.body
    )


def sources() -> list[str]:
    files = [*(ROOT / "triton_offload").rglob("*.[pc]*"), *(ROOT / "kernels").glob("*.py")]
    files = [file for file in files if file.suffix in (".py", ".c")]
    names = {str(file.relative_to(ROOT)) for file in files}
    return sorted(name for name in names if not name.startswith("triton_offload/kernels/"))


@pytest.mark.parametrize("name", sources())
def test_every_source_file_has_breaks_of_its_own(name):
    count = sum(each.file == name and not each.equivalent for each in BREAKS)
    assert count >= min(5, statements(ROOT / name))
