"""How much memory is there for a pool: on this machine, in this control group, in a file system."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from triton_offload.sizes import format_bytes

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def check_memory(
    name: str, num_bytes: int, proc: Path = _PROC, control_groups: Path = _CGROUPS
) -> None:
    """Raises ValueError that names the argument `name` where less memory than that is free.

    More than is free can be mapped all the same; what touches it last is killed for it.
    """
    free = free_memory(proc, control_groups)
    if free is not None:
        _check(name, num_bytes, free, "memory that is free here, control group included")


def check_room(name: str, num_bytes: int, folder: str) -> None:
    """The same for files, where memory is a file system: one may be smaller than the machine."""
    found = os.statvfs(folder)
    if found.f_blocks:  # none: without a bound of its own
        _check(name, num_bytes, found.f_bavail * found.f_frsize, f"what is free in {folder}")


def _check(name: str, num_bytes: int, free: int, what: str) -> None:
    if num_bytes > free:
        raise ValueError(
            f"{name}: expected at most {format_bytes(free)} ({what}), got {format_bytes(num_bytes)}"
        )


def free_memory(proc: Path = _PROC, control_groups: Path = _CGROUPS) -> int | None:
    """Bytes that can be had without swapping; None where nothing tells."""
    found = [*_available(proc), *_left_in_groups(proc, control_groups)]
    return max(0, min(found)) if found else None


def _available(proc: Path) -> Iterator[int]:
    for line in _read(proc / "meminfo").splitlines():
        key, _, rest = line.partition(":")
        if key == "MemAvailable":
            yield int(rest.split()[0]) * 1024


def _left_in_groups(proc: Path, control_groups: Path) -> Iterator[int]:
    """What each group leaves that this process is in; every parent's bound holds for it, too.

    A container may see the path from outside but only its own folder, which is the root then.
    """
    for line in _read(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files, stat = control_groups, ("memory.max", "memory.current"), ""
        elif "memory" in controllers.split(","):
            root = control_groups / "memory"
            files, stat = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
        else:
            continue
        place = root / path.lstrip("/")
        for folder in (place, *place.parents):
            limit, used = (_read(folder / name).strip() for name in files)
            if limit.isdigit() and used.isdigit():
                yield int(limit) - int(used) + _reclaimable(folder / "memory.stat", stat)
            if folder == root:
                break


def _reclaimable(file: Path, prefix: str) -> int:
    """The cache of files, which counts as used and makes room at once."""
    fields = dict(line.split(" ", 1) for line in _read(file).splitlines() if line)
    return sum(int(fields.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
