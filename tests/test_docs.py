"""What the documents name is there: files, modules, classes and their members, targets of make."""

from __future__ import annotations

import ast
import builtins
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    str(file.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "tests/*.md", "examples/*.md")
    for file in ROOT.glob(pattern)
    if file.name != "CHANGELOG.md"  # which tells of what was
)
PACKAGE = "triton_offload"
SOURCES = ("triton_offload", "kernels", "tests", "bench", "tools", "examples")
#: made by a command, or named as what a user writes
MADE = {"bench/out/report.md"}
#: names of others
FOREIGN = {"torch", "numpy", "np", "vllm", "pytest", "math", "cuda", "OffloadingConnector"}
#: what the next changes bring; a name goes from here when it is there
COMING = {"make quick", "make deep"}

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
_FILE = re.compile(r"[\w./*-]+(\.(py|md|toml|json)|/)(::\w+)?")


class Names:
    """What is defined in some files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.words: set[str] = set()
        self.members: dict[str, set[str]] = defaultdict(set)  # of each class
        self.functions: dict[str, list[ast.arguments]] = defaultdict(list)
        self.constants: set[str] = set()
        self.fields: dict[str, list[tuple[str, str | None]]] = {}
        self._bases: dict[str, set[str]] = defaultdict(set)
        for file in files:
            text = file.read_text()
            self.words |= set(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", text))
            tree = ast.parse(text)
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    self._add_class(node)
                elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    self.functions[node.name].append(node.args)
            for node in tree.body:
                self.constants |= set(_assigned(node))

    def _add_class(self, node: ast.ClassDef) -> None:
        found = self.members[node.name]
        self._bases[node.name] |= {ast.unparse(base).split("[")[0] for base in node.bases}
        for part in node.body:
            found |= set(_assigned(part))
            if isinstance(part, ast.FunctionDef):
                found.add(part.name)
                self.functions[f"{node.name}.{part.name}"].append(part.args)
                # what its methods give it
                found |= {
                    inner.attr
                    for inner in ast.walk(part)
                    if isinstance(inner, ast.Attribute)
                    and isinstance(inner.ctx, ast.Store)
                    and getattr(inner.value, "id", "") == "self"
                }
        self.fields[node.name] = [
            (part.target.id, _default(part.value))
            for part in node.body
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        ]

    def has_member(self, cls: str, name: str) -> bool:
        cls = cls.rpartition(".")[2]
        return name in self.members.get(cls, ()) or any(
            self.has_member(base, name) for base in self._bases.get(cls, ())
        )

    def defined(self, name: str) -> list[ast.arguments]:
        """Of a function; of a method, which a class above may define."""
        cls, _, method = name.rpartition(".")
        found = self.functions.get(name, [])
        bases = () if found else self._bases.get(cls, ())
        return found or [each for base in bases for each in self.defined(f"{base}.{method}")]

    def has(self, name: str) -> bool:
        """`Class`, `Class.member`, `function` or `CONSTANT`."""
        first, _, rest = name.partition(".")
        if rest:
            return self.has_member(first, rest.partition(".")[0])
        return name in self.members or name in self.functions or name in self.constants


def _default(value: ast.expr | None) -> str | None:
    """As a caller sees it: `field(default=x, ...)` is x."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        value = next((word.value for word in value.keywords if word.arg == "default"), None)
    return None if value is None else ast.unparse(value)


def _assigned(node: ast.stmt) -> Iterator[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    for target in targets if isinstance(node, ast.Assign | ast.AnnAssign) else ():
        for each in ast.walk(target):
            if isinstance(each, ast.Name):
                yield each.id


@cache
def names_of(*files: Path) -> Names:
    return Names(files)


@cache  # read by the tests, not by every process that collects them
def all_names() -> Names:
    return Names([file for part in SOURCES for file in (ROOT / part).rglob("*.py")])


@cache
def all_words() -> set[str]:
    return all_names().words | set(re.findall(r"[\w-]+", (ROOT / "pyproject.toml").read_text()))


TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def text_of(page: str) -> str:
    """Without its blocks of code."""
    return _FENCE.sub("", (ROOT / page).read_text())


def find(name: str, page: str) -> list[Path]:
    """The files that a page means by a path: from the root, from the package, beside the page."""
    folders = (ROOT, ROOT / "triton_offload", (ROOT / page).parent)
    return [file for folder in folders for file in folder.glob(name.rstrip("/"))]


def module_of(name: str) -> bool:
    """Whether a dotted name is a module of the package, or defined in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:end])
        files = [f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()]
        if files or place.is_dir():
            rest = ".".join(parts[end:])
            # The package hands on what its modules define.
            known = names_of(*files).has(rest) or rest in names_of(*files).words if files else False
            return not rest or known
    return False


def missing(span: str, page: str) -> str | None:
    """What of a name in backticks is not there; None where all is, or it is no name of ours."""
    if span in COMING | MADE or " ".join(span.split()[:2]) in COMING:
        return None
    if re.fullmatch(r"make [a-z-]+( [A-Z]+=\S+)?", span):
        return None if span.split()[1] in TARGETS else "no such target"
    if _FILE.fullmatch(span) and not span.startswith(("/", ".")) and "NAME" not in span:
        path, _, test = span.partition("::")
        files = find(path, page)
        if not files:
            return "no such file"
        return "no such test" if test and not names_of(*files).has(test) else None
    name = span.partition("(")[0]
    if not _NAME.fullmatch(name) or span.count("(") > 1 or not span.endswith((")", name[-1])):
        return None  # a command, or an expression
    first, _, rest = name.partition(".")
    if first in FOREIGN or hasattr(builtins, first):
        return None
    if first == PACKAGE:
        return None if module_of(name) else "no such module"
    if (first[0].isupper() and not first.isupper()) or ("(" in span and not rest):
        return None if all_names().has(name) else "not defined"
    return None if name.rpartition(".")[2] in all_words() else "no such name"


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    spans = dict.fromkeys(_SPAN.findall(text_of(page)))
    wrong = {span: why for span in spans if (why := missing(span, page)) is not None}
    assert not wrong


def test_a_row_that_begins_with_a_file_names_what_it_defines():
    """The way of a store or a load, file by file: what was moved must not be looked for there."""
    page, wrong, rows = "ARCHITECTURE.md", [], 0
    members = all_names().members
    for line in text_of(page).splitlines():
        cells = line.strip().strip("|").split(" | ")
        files = [file for span in _SPAN.findall(cells[0]) for file in find(span, page)]
        if not line.startswith("| `") or not all(file.is_file() for file in files):
            continue
        names = names_of(*files)
        for span in (span for cell in cells[1:] for span in _SPAN.findall(cell)):
            name = span.partition("(")[0]
            if _NAME.fullmatch(name) and "." in name and name.partition(".")[0] in members:
                rows += 1
                if not names.has(name):
                    wrong.append(f"{span} in {cells[0]}")
    assert not wrong
    assert rows > 20


def test_every_file_of_the_tests_has_its_row():
    page = (ROOT / "tests" / "README.md").read_text()
    named = {span for line in page.splitlines() for span in _SPAN.findall(line.partition(" | ")[0])}
    files = {file.name for file in (ROOT / "tests").glob("*.py")}
    assert files - named == {"conftest.py"}


def test_every_ordering_rule_has_its_line():
    source = (ROOT / "triton_offload/transfer/pipeline.py").read_text()
    rules = re.findall(r"^(\d+)\. ", ast.get_docstring(ast.parse(source)), re.MULTILINE)
    assert rules == re.findall(r"^\| (\d+) \|", text_of("ARCHITECTURE.md"), re.MULTILINE)
    assert rules


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", text_of(str(file.resolve().relative_to(ROOT))), re.M)
            slugs = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert anchor in slugs, target


@pytest.mark.parametrize("page", PAGES)
def test_python_in_a_page_imports_what_is_there(page):
    for language, code in _FENCE.findall((ROOT / page).read_text()):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
                for alias in node.names:
                    assert module_of(f"{node.module}.{alias.name}"), ast.unparse(node)


def test_the_break_that_is_shown_is_one():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    (shown,) = [code for language, code in _FENCE.findall(page) if language == "toml"]
    (each,) = tomllib.loads(shown)["break"]
    files = (ROOT / "tests" / "breaks").glob("*.toml")
    assert any(each in tomllib.loads(file.read_text())["break"] for file in files)


def signature(arguments: ast.arguments, *, method: bool) -> list[tuple[str, str | None]]:
    """Names and defaults, `*` where only names may follow."""
    plain = [*arguments.posonlyargs, *arguments.args][int(method) :]
    defaults = [None] * len(plain) + [ast.unparse(each) for each in arguments.defaults]
    found = [(a.arg, d) for a, d in zip(plain, defaults[len(defaults) - len(plain) :], strict=True)]
    if arguments.kwonlyargs:
        found.append(("*", None))
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append((each.arg, None if default is None else ast.unparse(default)))
    return found


def signatures_in(page: str) -> list[tuple[str, str]]:
    """(name, arguments) of what a page's code blocks declare, as `Class.method(...)`."""
    blocks = [code for language, code in _FENCE.findall((ROOT / page).read_text()) if not language]
    lines = re.sub(r"\n +", " ", "\n".join(blocks)).splitlines()
    found = [re.fullmatch(r"([A-Za-z_.]+)\((.*)\)( -> .*)?", line) for line in lines]
    return [(match[1], match[2]) for match in found if match]


@pytest.mark.parametrize("declared", signatures_in("docs/api.md"), ids=lambda pair: pair[0])
def test_a_signature_of_the_api_page_is_that_of_the_code(declared):
    name, arguments = declared
    said = signature(ast.parse(f"def f({arguments}): pass").body[0].args, method=False)
    own = names_of(*sorted((ROOT / "triton_offload").rglob("*.py")))
    is_class = name in own.members
    called = f"{name}.__init__" if is_class else name
    if is_class and called not in own.functions:
        assert said == own.fields[name]
        return
    defined = [signature(each, method="." in called) for each in own.defined(called)]
    assert said in defined


def test_what_is_not_there_is_found():
    assert missing("transfer/nowhere.py", "ARCHITECTURE.md") == "no such file"
    assert missing("Lane.nothing", "ARCHITECTURE.md") == "not defined"
    assert missing("nothing_of_this_name()", "ARCHITECTURE.md") == "not defined"
    assert missing("make nothing", "README.md") == "no such target"
    assert missing("triton_offload.nothing", "README.md") == "no such module"
    assert missing("NothingOfThisName", "docs/api.md") == "not defined"
    assert missing("tests/test_docs.py::test_nothing", "CONTRIBUTING.md") == "no such test"
    assert missing("Lane.pump", "ARCHITECTURE.md") is None
    assert missing("transfer/lane.py", "ARCHITECTURE.md") is None
