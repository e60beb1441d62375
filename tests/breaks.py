"""Breaks of a line or two in the source, one after another: does a test notice?

    python tests/breaks.py                       # all of them, two at a time
    python tests/breaks.py transfer              # those of one folder: tests/breaks/transfer.toml
    python tests/breaks.py --named "last row"    # those with these words in their names

Each lies in `tests/breaks/*.toml`: what the file says, what it says instead, and the tests that
must fail then; or, where nothing changes that anybody could see, why. A break is put into a copy of
the project, and its tests run there in a process forked from one that has imported torch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "breaks"
#: what a copy needs
FOLDERS = ("triton_offload", "kernels", "tests", "bench", "tools", "examples", "docs")
PARTS = (*FOLDERS, "pyproject.toml", "README.md")
TIMEOUT_SECONDS = 180


@dataclass(frozen=True, slots=True)
class Break:
    """`was` stands once in `file`. `caught_by`: tests of which one at least must fail, as pytest
    takes them; none where it is `equivalent`, for the reason given."""

    name: str
    file: str
    was: str
    becomes: str
    caught_by: tuple[str, ...] = ()
    equivalent: str = ""

    def broken(self, source: str) -> str:
        """The source with the break; raises ValueError unless it says once what it should."""
        count = source.count(self.was)
        if count != 1:
            raise ValueError(f"{self.name}: expected its text once in {self.file}, got {count}")
        if self.becomes == self.was:
            raise ValueError(f"{self.name}: changes nothing")
        return source.replace(self.was, self.becomes)


def read_breaks(folder: Path = FOLDER) -> dict[str, list[Break]]:
    """The breaks of each file of `folder`, by its name without the ending."""
    found = {}
    for file in sorted(folder.glob("*.toml")):
        entries = tomllib.loads(file.read_text()).get("break", [])
        found[file.stem] = [_entry(entry) for entry in entries]
    return found


def _entry(entry: dict[str, object]) -> Break:
    caught_by = entry.pop("caught_by", ())
    tests = (caught_by,) if isinstance(caught_by, str) else tuple(caught_by)
    each = Break(caught_by=tests, **entry)
    if bool(each.caught_by) == bool(each.equivalent):
        raise ValueError(f"{each.name}: expected either caught_by or equivalent")
    return each


def copy_project(place: Path) -> None:
    """Compiled files come along: they are valid as long as their sources are as old as they say."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, place / part, symlinks=True)
        else:
            shutil.copy2(source, place / part)


def put(file: Path, text: str) -> None:
    """Write a source, and forget what was compiled of it."""
    file.write_text(text)
    for compiled in file.parent.glob(f"__pycache__/{file.stem}.*.pyc"):
        compiled.unlink()


def run_in(place: Path, tests: tuple[str, ...]) -> int:
    """In a child of its own: pytest's exit status."""
    sys.path[:] = [str(place), *(p for p in sys.path if Path(p) not in (ROOT, ROOT / "tests"))]
    os.environ["PYTHONPATH"] = str(place)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.chdir(place)
    import pytest

    # What is imported already can't be rewritten, and need not be.
    quiet = ("-x", "-q", "-p", "no:cacheprovider", "--no-header")
    try:
        return pytest.main([*quiet, "-W", "ignore::pytest.PytestAssertRewriteWarning", *tests])
    except Warning:  # an error here, as any: what a test that failed left behind, at the very end
        traceback.print_exc()
        return 1


@dataclass(slots=True)
class Running:
    each: Break
    pid: int
    place: Path  # a copy of the project, for one break at a time
    since: float

    @property
    def output(self) -> Path:
        return self.place.with_suffix(".output")


def start(each: Break, place: Path) -> Running:
    put(place / each.file, each.broken((ROOT / each.file).read_text()))
    running = Running(each, 0, place, time.monotonic())
    running.pid = os.fork()
    if running.pid == 0:
        status = 70
        try:
            os.setpgid(0, 0)
            with running.output.open("wb") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            status = int(run_in(place, each.caught_by))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return running


def verdict(status: int | None) -> tuple[bool, str]:
    """Whether the break was noticed, and how. None: the tests did not end."""
    if status is None:
        return True, "never ends"
    if os.WIFSIGNALED(status):
        return True, f"signal {os.WTERMSIG(status)}"
    code = os.WEXITSTATUS(status)
    if code == 1:
        return True, "fails"
    if code == 0:
        return False, "NOT NOTICED"
    return False, f"NOT RUN (pytest's status {code})"


def preload(breaks: list[Break]) -> None:
    """What takes seconds to import is imported once; nothing of the project itself."""
    names = ["torch", "numpy", "triton", "hypothesis", "pytest", "rich", "typer"]
    if any(each.file.startswith("triton_offload/vllm/") for each in breaks):
        names.append("vllm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            if importlib.util.find_spec(name):
                importlib.import_module(name)


def run(breaks: list[Break], jobs: int) -> Iterator[tuple[Break, bool, str, float, str]]:
    """(break, noticed, how, seconds, output) of each, as they end."""
    preload(breaks)
    waiting: list[Break] = list(reversed(breaks))
    running: list[Running] = []
    with tempfile.TemporaryDirectory(prefix="triton-offload-breaks-") as folder:
        free = [Path(folder) / str(i) for i in range(min(jobs, len(breaks)))]
        for place in free:
            copy_project(place)
        while waiting or running:
            while waiting and free:
                running.append(start(waiting.pop(), free.pop()))
            time.sleep(0.01)
            for work in list(running):
                pid, status = os.waitpid(work.pid, os.WNOHANG)
                late = time.monotonic() - work.since > TIMEOUT_SECONDS
                if pid == 0 and not late:
                    continue
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(work.pid, signal.SIGKILL)  # what its tests left behind, too
                if pid == 0:
                    os.waitpid(work.pid, 0)
                noticed, how = verdict(None if pid == 0 else status)
                output = work.output.read_text(errors="replace") if work.output.exists() else ""
                put(work.place / work.each.file, (ROOT / work.each.file).read_text())
                running.remove(work)
                free.append(work.place)
                yield work.each, noticed, how, time.monotonic() - work.since, output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", help="files of tests/breaks, without the ending")
    parser.add_argument("--named", default="", help="words in the names")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--verbose", action="store_true", help="what the tests printed")
    chosen = parser.parse_args()
    found = read_breaks()
    unknown = set(chosen.folders) - set(found)
    if unknown:
        parser.error(f"expected some of {sorted(found)}, got {sorted(unknown)}")
    breaks = [
        each
        for name, entries in found.items()
        for each in entries
        if (not chosen.folders or name in chosen.folders)
        and chosen.named in each.name
        and each.caught_by
    ]
    survived = []
    for each, noticed, how, seconds, output in run(breaks, chosen.jobs):
        print(f"{how:>12}  {seconds:5.1f} s  {each.file}: {each.name}", flush=True)
        if not noticed:
            survived.append(each)
        if chosen.verbose or not noticed:
            print("\n".join(output.splitlines()[-15:]))
    print(f"{len(breaks) - len(survived)} passed, {len(survived)} failed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
