"""Memory that several processes map: private, never under a name for longer than it takes."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from triton_offload.pool import shared_memory
from triton_offload.pool.shared_memory import create, join

SIZE = 8192

# Joins or creates, says so, and stays until its standard input ends.
RANK = """
import sys
from triton_offload.pool import shared_memory
make, path, rank, ranks, timeout = sys.argv[1:]
memory = getattr(shared_memory, make)(path, 8192, int(ranks), float(timeout))
memory[int(rank)] = 1
print("in", flush=True)
sys.stdin.read()
"""


def start(make: str, path: Path, rank: int, num_ranks: int, timeout: float) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", RANK, make, str(path), str(rank), str(num_ranks), str(timeout)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pool"


def test_processes_map_one_memory_and_its_name_is_gone_when_the_last_has(path):
    ranks = [start("join", path, rank, 4, 60) for rank in (1, 2, 3)]
    memory = create(str(path), SIZE, 4, 60)
    assert not path.exists()
    for rank in ranks:
        assert rank.stdout.readline() == "in\n"
    assert memory[:5] == b"\0\1\1\1\0"
    for rank in ranks:
        rank.communicate(timeout=60)
        assert rank.returncode == 0
    assert memory[1] == 1  # a process that ended takes nothing along


def test_the_name_stays_until_the_last_has_come(path):
    with ThreadPoolExecutor() as threads:
        made = threads.submit(create, str(path), SIZE, 3, 60)
        first = threads.submit(join, str(path), SIZE, 3, 60)
        until(lambda: path.exists() and path.stat().st_size == SIZE + 1)
        assert not made.done()
        assert not first.done()
        join(str(path), SIZE, 3, 60)
        assert not path.exists()
        assert len(made.result(60)) == len(first.result(60)) == SIZE


def test_a_rank_alone_has_memory_without_a_name(path):
    memory = create(str(path), SIZE, 1, 60)
    assert not path.exists()
    assert memory[:] == bytes(SIZE)


def test_where_a_rank_never_comes_everybody_is_told_and_the_file_goes(path):
    with ThreadPoolExecutor() as threads:
        joined = threads.submit(join, str(path), SIZE, 3, 60)
        with pytest.raises(TimeoutError, match="2 of 3 ranks"):
            create(str(path), SIZE, 3, 0.3)
        assert not path.exists()
        with pytest.raises(RuntimeError, match=r"2 of 3 ranks .*one of them gave up"):
            joined.result(60)


def test_a_pool_that_nobody_makes_is_waited_for_in_vain(path):
    with pytest.raises(TimeoutError, match="was not made in time"):
        join(str(path), SIZE, 2, 0.05)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277])
def test_nobody_else_can_open_the_file_whatever_the_umask(path, umask):
    with ThreadPoolExecutor() as threads:
        before = os.umask(umask)
        try:
            made = threads.submit(create, str(path), SIZE, 2, 60)
            until(lambda: path.exists() and path.stat().st_size == SIZE)
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        join(str(path), SIZE, 2, 60)
        made.result(60)


@pytest.mark.parametrize("kind", ["file", "link to a file", "link to nothing"])
def test_a_path_that_is_taken_is_refused_and_left_alone(path, kind):
    target = path.with_name("target")
    if kind == "file":
        path.write_bytes(b"mine")
    else:
        path.symlink_to(target)
        if kind == "link to a file":
            target.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        create(str(path), SIZE, 1, 60)
    if kind == "link to nothing":
        assert not target.exists()
    else:
        assert path.read_bytes() == b"mine"


def test_nobody_joins_through_a_link(path):
    target = path.with_name("target")
    target.write_bytes(bytes(SIZE))
    target.chmod(0o600)
    path.symlink_to(target)
    with pytest.raises(OSError, match="symbolic link"):
        join(str(path), SIZE, 2, 60)
    assert target.stat().st_size == SIZE


@pytest.mark.parametrize("mode", [0o640, 0o620, 0o610, 0o604, 0o602, 0o601, 0o644])
def test_nobody_joins_what_others_can_open(path, mode):
    path.write_bytes(bytes(SIZE))
    path.chmod(mode)
    with pytest.raises(PermissionError, match="expected a file of this user alone"):
        join(str(path), SIZE, 2, 60)
    assert path.stat().st_size == SIZE  # somebody else's, perhaps: it is left alone


def test_nobody_joins_what_another_user_made(path, monkeypatch):
    path.write_bytes(bytes(SIZE))
    path.chmod(0o600)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="expected a file of this user alone"):
        join(str(path), SIZE, 2, 60)


def test_the_last_that_comes_between_two_looks_is_no_rank_that_gave_up(path, monkeypatch):
    path.write_bytes(bytes(SIZE + 1))
    looks, real = [], os.fstat

    def look(handle):
        found = real(handle)
        looks.append(found)
        if len(looks) == 1:  # right after the first look, whatever it is for
            os.write(handle, b"\0")
            path.unlink()
        return found

    handle = os.open(path, os.O_RDWR | os.O_APPEND)
    monkeypatch.setattr(os, "fstat", look)
    shared_memory._wait_for_all(handle, str(path), SIZE, 3, time.monotonic() + 60)
    os.close(handle)
    assert len(looks) == 2


def test_all_memory_is_taken_before_anybody_maps_it(path):
    with ThreadPoolExecutor() as threads:
        made = threads.submit(create, str(path), SIZE, 2, 60)
        until(lambda: path.exists() and path.stat().st_size == SIZE)
        assert path.stat().st_blocks * 512 >= SIZE
        join(str(path), SIZE, 2, 60)
        made.result(60)


def test_where_there_is_no_room_the_error_says_for_what(path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    message = rf"no {SIZE} bytes for the host pool: No space left on device: '{path}'"
    with pytest.raises(OSError, match=message) as raised:
        create(str(path), SIZE, 2, 60)
    assert raised.value.errno == errno.ENOSPC
    assert not path.exists()


def test_a_rank_waits_as_long_as_memory_is_being_taken_and_no_longer(path, monkeypatch):
    monkeypatch.setattr(shared_memory, "_POLL_SECONDS", 0.01)
    sizes = [(0, i) for i in range(20)]

    def look(handle):
        size, blocks = sizes.pop(0)
        return SimpleNamespace(st_size=size, st_blocks=blocks)

    monkeypatch.setattr(os, "fstat", look)
    sizes.append((SIZE, 20))
    shared_memory._wait_for_maker(0, str(path), 0.05)
    assert not sizes
    sizes[:] = [(0, 7)] * 1000
    with pytest.raises(TimeoutError, match="was not made ready in time"):
        shared_memory._wait_for_maker(0, str(path), 0.05)


@pytest.mark.parametrize(("size", "num_ranks"), [(SIZE + 4096, 3), (SIZE - 4096, 3), (SIZE, 1)])
def test_a_rank_with_another_idea_of_the_pool_ends_the_set_up_for_all(path, size, num_ranks):
    with ThreadPoolExecutor() as threads:
        made = threads.submit(create, str(path), SIZE, 3, 60)
        with pytest.raises(ValueError, match=f"a pool of {size} bytes for {num_ranks} ranks, got"):
            join(str(path), size, num_ranks, 60)
        with pytest.raises(RuntimeError, match="gave up"):
            made.result(60)
    assert not path.exists()


def open_files(folder: Path) -> list[str]:
    """Those of this process that lie there, deleted ones too."""
    found = []
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{handle}"))
    return [name for name in found if name.startswith(str(folder))]


@pytest.mark.parametrize("step", ["posix_fallocate", "fchmod", "mmap"])
def test_an_error_while_the_file_is_made_leaves_none(path, step, monkeypatch):
    def fail(*args):
        raise OSError(28, "no space left")

    monkeypatch.setattr(mmap if step == "mmap" else os, step, fail)
    with pytest.raises(OSError, match="no space left"):
        create(str(path), SIZE, 2, 60)
    assert not path.exists()
    assert open_files(path.parent) == []


@pytest.mark.parametrize("joins_first", [True, False])
def test_a_maker_that_is_killed_leaves_no_file_once_a_rank_has_noticed(path, joins_first):
    maker = start("create", path, 0, 3, 60)
    until(lambda: path.exists() and path.stat().st_size >= SIZE)
    with ThreadPoolExecutor() as threads:
        if joins_first:
            joined = threads.submit(join, str(path), SIZE, 3, 0.5)
            until(lambda: path.stat().st_size == SIZE + 1)
        maker.send_signal(signal.SIGKILL)
        maker.communicate(timeout=60)
        if not joins_first:
            joined = threads.submit(join, str(path), SIZE, 3, 0.2)
        with pytest.raises(TimeoutError):
            joined.result(60)
    assert not path.exists()


def test_a_rank_that_gives_up_leaves_a_newer_file_of_that_name_alone(path):
    with ThreadPoolExecutor() as threads:
        path.write_bytes(bytes(SIZE))
        path.chmod(0o600)
        joined = threads.submit(join, str(path), SIZE, 3, 0.5)
        until(lambda: path.stat().st_size == SIZE + 1)
        path.unlink()
        path.write_bytes(b"new")
        with pytest.raises(RuntimeError, match="gave up"):
            joined.result(60)
    assert path.read_bytes() == b"new"
