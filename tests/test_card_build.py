"""Building the imitated card: once for all processes, anew when anything of it changes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from card import build
from card.build import NO_COMPILER, cache_folder, compiler, shared_library

pytestmark = pytest.mark.skipif(compiler() is None, reason=NO_COMPILER)

SOURCES = ("memory.c",)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where libraries of this test lie."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shared_library.cache_clear()
    yield cache_folder()
    shared_library.cache_clear()


def test_a_library_is_built_once(folder: Path) -> None:
    built = shared_library("libmemory.so.1", SOURCES)
    assert built.name == "libmemory.so.1"
    assert built.parent.parent == folder
    assert ctypes.CDLL(str(built)).memory_remove(ctypes.c_uint64(1)) == -1
    when = built.stat().st_mtime_ns
    shared_library.cache_clear()  # as another process
    assert shared_library("libmemory.so.1", SOURCES) == built
    assert built.stat().st_mtime_ns == when
    assert [file.name for file in built.parent.iterdir() if file.suffix != ".1"] == ["lock"]


def test_a_change_makes_another_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shared_library("libmemory.so", SOURCES)
    assert shared_library("libmemory.so", SOURCES, ("-DOTHER",)) != first
    assert shared_library("libother.so", SOURCES).parent != first.parent
    changed = folder.parent / "card"
    changed.mkdir()
    for file in [*build.HERE.glob("*.h"), build.HERE / "memory.c"]:
        (changed / file.name).write_text(file.read_text())
    monkeypatch.setattr(build, "HERE", changed)
    shared_library.cache_clear()
    assert shared_library("libmemory.so", SOURCES) == first.parent / "libmemory.so"
    with (changed / "memory.h").open("a") as header:
        header.write("/* changed */\n")
    shared_library.cache_clear()
    assert shared_library("libmemory.so", SOURCES) != first


def test_processes_that_ask_at_once_have_one_library(folder: Path) -> None:
    program = f"from card.build import shared_library; print(shared_library('lib.so', {SOURCES}))"
    environment = {**os.environ, "PYTHONPATH": str(build.HERE.parent), "TMPDIR": str(folder.parent)}
    asked = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    answers = {process.communicate(timeout=120)[0].strip() for process in asked}
    assert all(process.returncode == 0 for process in asked)
    (answer,) = answers
    assert ctypes.CDLL(answer).memory_remove(ctypes.c_uint64(1)) == -1


@pytest.mark.usefixtures("folder")
def test_what_the_compiler_says_is_passed_on() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)failed to build lib\.so.*no_such\.h"):
        shared_library("lib.so", SOURCES, ("-include", "no_such.h"))


@pytest.mark.usefixtures("folder")
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert compiler() is None
    with pytest.raises(RuntimeError, match="no C compiler"):
        shared_library("lib.so", SOURCES)


def test_a_folder_that_others_can_write_to_is_not_trusted(folder: Path) -> None:
    folder.chmod(0o777)
    with pytest.raises(RuntimeError, match="nobody else can write to"):
        shared_library("lib.so", SOURCES)
