"""Files of vLLM's region: those of dead engines go at start, and no other file does.

The module is loaded by its path, for its package imports vllm, which takes seconds.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_FILE = Path(__file__).parent.parent / "triton_offload" / "vllm" / "stale_regions.py"
_spec = importlib.util.spec_from_file_location("stale_regions", _FILE)
assert _spec is not None
assert _spec.loader is not None
stale_regions: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stale_regions)
remove = stale_regions.remove_stale_regions

_HOLDERS = {
    "opened": "import sys; file = open(sys.argv[1]); print(flush=True); input()",
    "mapped": (
        "import mmap, sys\n"
        "with open(sys.argv[1], 'r+b') as file:\n"
        "    memory = mmap.mmap(file.fileno(), 0)\n"
        "print(flush=True); input()"
    ),
}


@pytest.fixture(autouse=True)
def everything_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever container the tests run in; their holders are of this very one."""
    monkeypatch.setattr(stale_regions, "_sees_every_process", lambda proc: True)


@pytest.fixture
def proc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A /proc with this process alone: some of a machine's can't be asked what they hold."""
    folder = tmp_path_factory.mktemp("proc")
    for name in ("self", str(os.getpid())):
        (folder / name).symlink_to(f"/proc/{os.getpid()}")
    (folder / "meminfo").touch()
    return folder


def make(folder: Path, engine_id: str, suffix: str = "") -> Path:
    path = folder / f"vllm_offload_{engine_id}.mmap{suffix}"
    path.write_bytes(b"x" * 4096)
    return path


@contextmanager
def holder(kind: str, path: Path, proc: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", _HOLDERS[kind], str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.read(1) == b"\n"
        (proc / str(child.pid)).symlink_to(f"/proc/{child.pid}")
        yield child
        child.kill()


def test_files_of_dead_engines_go_all_of_their_segments(tmp_path: Path, proc: Path) -> None:
    stale = [make(tmp_path, "dead"), make(tmp_path, "dead", ".1"), make(tmp_path, "other")]
    assert sorted(remove("new", tmp_path, proc)) == sorted(stale)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", _HOLDERS)
def test_the_file_of_a_live_engine_stays_and_goes_when_it_was_killed(
    tmp_path: Path, proc: Path, kind: str
) -> None:
    path = make(tmp_path, "live")
    with holder(kind, path, proc) as child:
        assert remove("new", tmp_path, proc) == []
        assert path.exists()
        child.kill()
        child.wait()
        assert remove("new", tmp_path, proc) == [path]


def test_a_file_of_this_process_stays(tmp_path: Path, proc: Path) -> None:
    path = make(tmp_path, "mine")
    with path.open():
        assert remove("new", tmp_path, proc) == []


@pytest.mark.parametrize("seen", [True, False], ids=["on the machine", "in a container"])
def test_what_a_rank_of_this_engine_has_just_made_stays(
    tmp_path: Path, proc: Path, seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stale_regions, "_sees_every_process", lambda proc: seen)
    path = make(tmp_path, "same")
    assert remove("same", tmp_path, proc) == []
    assert path.exists()


@pytest.mark.parametrize("seen", [True, False], ids=["on the machine", "in a container"])
def test_what_an_engine_of_this_id_left_before_this_process_began_goes(
    tmp_path: Path, proc: Path, seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stale_regions, "_sees_every_process", lambda proc: seen)
    path = make(tmp_path, "same")
    monkeypatch.setattr(stale_regions, "_began", lambda proc: time.time() + 1)
    assert remove("same", tmp_path, proc) == [path]


def test_in_a_container_files_of_other_engines_stay(
    tmp_path: Path, proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stale_regions, "_sees_every_process", lambda proc: False)
    path = make(tmp_path, "other")
    assert remove("new", tmp_path, proc) == []
    assert path.exists()


def test_no_other_file_goes(tmp_path: Path, proc: Path) -> None:
    kept = [
        tmp_path / name
        for name in ("psm_1234", "vllm_offload_x.txt", "vllm_offload_x.mmap.old", "my.mmap")
    ]
    for path in kept:
        path.write_bytes(b"x")
    (tmp_path / "vllm_offload_folder.mmap").mkdir()
    (tmp_path / "vllm_offload_link.mmap").symlink_to(kept[0])
    before = sorted(tmp_path.iterdir())
    assert remove("new", tmp_path, proc) == []
    assert sorted(tmp_path.iterdir()) == before


def test_files_of_another_user_stay(
    tmp_path: Path, proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "other")
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    assert remove("new", tmp_path, proc) == []


def test_nothing_goes_where_a_process_can_not_be_asked(
    tmp_path: Path, proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "other")

    def refuse(process: Path) -> Any:
        raise PermissionError

    monkeypatch.setattr(stale_regions, "_mapped", refuse)
    assert remove("new", tmp_path, proc) == []


def test_processes_that_end_meanwhile_hold_nothing(
    tmp_path: Path, proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path, "other")

    def vanish(process: Path) -> Any:
        raise ProcessLookupError

    monkeypatch.setattr(stale_regions, "_opened", vanish)
    assert remove("new", tmp_path, proc) == [path]


def test_whoever_holds_the_lock_delays_a_start_only_so_long(
    tmp_path: Path, proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path, "other")
    monkeypatch.setattr(stale_regions, "_LOCK_SECONDS", 0.05)
    with stale_regions._locked(tmp_path) as locked:
        assert locked
        assert remove("new", tmp_path, proc) == []
    assert remove("new", tmp_path, proc) == [path]


def test_a_process_began_before_now_and_after_the_machine_did() -> None:
    command = [
        sys.executable,
        "-c",
        "import importlib.util, pathlib, sys\n"
        f"spec = importlib.util.spec_from_file_location('stale_regions', {str(_FILE)!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module._began(pathlib.Path('/proc')))",
    ]
    before = time.time()
    began = float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert before - 0.1 <= began <= time.time() + 0.1
