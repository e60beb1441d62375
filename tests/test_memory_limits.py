"""How much memory is there, read from made-up trees of /proc and /sys/fs/cgroup."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from triton_offload.pool import memory_limits
from triton_offload.pool.memory_limits import check_memory, check_room, free_memory

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path):
    """Writes files by their names below the folder; `free()` reads them."""

    def write(files):
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")

    def free():
        return free_memory(tmp_path / "proc", tmp_path / "groups")

    write({"proc/meminfo": f"MemTotal:  {16 << 20} kB\nMemFree: 5 kB\nMemAvailable: {8 << 20} kB"})
    return SimpleNamespace(write=write, free=free, folder=tmp_path)


def v2(place, limit, used, **stat):
    """Files of a group; `stat`: GiB."""
    return {
        f"groups/{place}memory.max": limit if limit == "max" else limit * GIB,
        f"groups/{place}memory.current": used * GIB,
        f"groups/{place}memory.stat": "\n".join(f"{k} {v * GIB}" for k, v in stat.items()),
    }


def v1(place, limit, used, **stat):
    return {
        f"groups/memory/{place}memory.limit_in_bytes": limit * GIB,
        f"groups/memory/{place}memory.usage_in_bytes": used * GIB,
        f"groups/memory/{place}memory.stat": "\n".join(f"{k} {v * GIB}" for k, v in stat.items()),
    }


def test_without_groups_it_is_what_the_machine_has_available(machine):
    assert machine.free() == 8 * GIB


def test_where_nothing_tells_nothing_is_refused(tmp_path):
    assert free_memory(tmp_path, tmp_path) is None
    check_memory("host_bytes", 10**18, tmp_path, tmp_path)


def test_the_bound_of_a_group_counts_less_what_it_uses_but_for_the_cache_of_files(machine):
    machine.write({"proc/self/cgroup": "0::/job"})
    machine.write(v2("job/", 6, 5, anon=2, inactive_file=1, active_file=2, file=7, shmem=4))
    assert machine.free() == 4 * GIB


def test_the_tightest_of_all_parents_counts(machine):
    machine.write({"proc/self/cgroup": "0::/a/b/c"})
    machine.write(v2("a/b/c/", "max", 1) | v2("a/b/", 7, 1) | v2("a/", 4, 2) | v2("", 5, 1))
    assert machine.free() == 2 * GIB
    machine.write(v2("", 5, 4))
    assert machine.free() == GIB


def test_a_container_sees_its_own_folder_as_the_root_and_a_path_from_outside(machine):
    machine.write({"proc/self/cgroup": "0::/docker/0123"})
    machine.write(v2("", 3, 1))
    assert machine.free() == 2 * GIB


def test_the_older_kind_of_groups(machine):
    lines = "9:cpu,cpuacct:/x\n4:memory:/job\n1:name=systemd:/\n0::/"
    machine.write({"proc/self/cgroup": lines})
    machine.write(v1("job/", 6, 5, active_file=9, total_active_file=1, total_inactive_file=1))
    machine.write(v1("", 2**33, 7))  # without a bound, as the kernel writes it
    machine.write(v1("x/", 1, 1))  # of memory, but not its own
    assert machine.free() == 3 * GIB


def test_a_group_that_is_over_its_bound_leaves_nothing(machine):
    machine.write({"proc/self/cgroup": "0::/"} | v2("", 3, 5))
    assert machine.free() == 0


def test_one_byte_more_than_is_free_is_refused_with_both_sizes(machine):
    places = machine.folder / "proc", machine.folder / "groups"
    check_memory("host_bytes", 8 * GIB, *places)
    with pytest.raises(ValueError, match=r"host_bytes: expected at most 8\.0 GiB .*got 8\.0 GiB"):
        check_memory("host_bytes", 8 * GIB + 1, *places)
    with pytest.raises(ValueError, match=r"pool: .*8\.0 GiB \(memory that is free.*500\.0 GiB"):
        check_memory("pool", 500 * GIB, *places)


def test_a_file_system_holds_what_is_free_there(monkeypatch):
    found = SimpleNamespace(f_blocks=10, f_bfree=9, f_bavail=3, f_frsize=4096, f_bsize=1 << 20)
    monkeypatch.setattr(memory_limits.os, "statvfs", lambda folder: found)
    check_room("host_bytes", 3 * 4096, "/dev/shm")
    with pytest.raises(ValueError, match=r"host_bytes: .* 12\.0 KiB \(what is free in /dev/shm"):
        check_room("host_bytes", 3 * 4096 + 1, "/dev/shm")
    found.f_blocks = found.f_bavail = 0  # a tmpfs without a bound
    check_room("host_bytes", 10**18, "/dev/shm")


def test_this_machine_has_some_memory():
    free = free_memory()
    assert free is None or 0 < free < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
