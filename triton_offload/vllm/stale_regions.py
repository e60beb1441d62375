"""Files of vLLM's shared region that were left by engines which died while they started.

The region's file has its name only until every rank has mapped it. An engine that is killed before
leaves it, and with it the memory that was touched; an engine of the same id would join it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_log = logging.getLogger(__name__)

# vLLM's names: since 0.33 a region may have several files.
_NAME = re.compile(r"vllm_offload_(?P<engine_id>.+)\.mmap(\.\d+)?")
# Of the namespace that sees the processes of all others (PROC_PID_INIT_INO in Linux' proc_fs.h).
_FIRST_NAMESPACE = 0xEFFFFFFC
_LOCK_SECONDS = 5.0
_CLOCK_SECONDS = 0.1  # what the clocks of files and of processes may differ by

# A file, whatever its name: device and inode.
_Identity = tuple[int, int]


def region_file(engine_id: str) -> Path:
    """vLLM's name of the region of an engine; of the first file, where it has several."""
    return Path(f"/dev/shm/vllm_offload_{engine_id}.mmap")


def remove_stale_regions(
    engine_id: str, folder: Path = Path("/dev/shm"), proc: Path = Path("/proc")
) -> list[Path]:
    """Remove what dead engines left in `folder`, and return it.

    Removed is what belongs to this user, what no process has open or mapped, and what is either of
    an engine with this very id, made before this process began, or seen from where all processes
    are seen: from inside a container another's live file looks like a dead one. Call it before the
    region of `engine_id` is made; several ranks may at once.
    """
    removed = []
    with _locked(folder) as locked:
        found = _found(folder) if locked else {}
        if found and not _sees_every_process(proc):
            found = {p: file for p, file in found.items() if _engine_id(p) == engine_id}
        for path, (_, changed) in list(found.items()):
            if _engine_id(path) == engine_id and changed >= _began(proc) - _CLOCK_SECONDS:
                del found[path]  # another rank of this engine has made it by now
        live = _held(proc) if found else set()
        for path, (identity, _) in found.items():
            if live is not None and identity not in live:
                with suppress(FileNotFoundError):
                    path.unlink()
                    removed.append(path)
    if removed:
        names = ", ".join(path.name for path in removed)
        _log.warning("removed what engines that died while they started have left: %s", names)
    return removed


def _engine_id(path: Path) -> str:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return match["engine_id"]


def _found(folder: Path) -> dict[Path, tuple[_Identity, float]]:
    """The regions' files of this user: which file it is, and when it was last changed."""
    found = {}
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            file = path.lstat()
            if (
                _NAME.fullmatch(path.name)
                and stat.S_ISREG(file.st_mode)
                and file.st_uid == os.geteuid()
            ):
                found[path] = (file.st_dev, file.st_ino), file.st_ctime
    return found


def _held(proc: Path) -> set[_Identity] | None:
    """The files that processes of this user have open or mapped; None where one can't be asked."""
    held: set[_Identity] = set()
    for process in proc.iterdir():
        if not process.name.isdigit():
            continue
        try:
            if _user(process) == os.geteuid():
                held |= {*_opened(process), *_mapped(process)}
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        except PermissionError:
            return None
    return held


def _user(process: Path) -> int:
    # Who owns the folder is another matter: of a process that can't be traced it is root.
    lines = (process / "status").read_text().splitlines()
    uids = next(line for line in lines if line.startswith("Uid:"))
    return int(uids.split()[2])  # the effective one, after the real one


def _opened(process: Path) -> Iterator[_Identity]:
    for link in (process / "fd").iterdir():
        with suppress(FileNotFoundError):
            file = link.stat()
            yield file.st_dev, file.st_ino


def _mapped(process: Path) -> Iterator[_Identity]:
    for line in (process / "maps").read_text().splitlines():
        _, _, _, device, inode, *_ = line.split(maxsplit=5)
        major, minor = (int(part, 16) for part in device.split(":"))
        yield os.makedev(major, minor), int(inode)


def _sees_every_process(proc: Path) -> bool:
    return (proc / "self/ns/pid").stat().st_ino == _FIRST_NAMESPACE


def _began(proc: Path) -> float:
    """When this process began, in seconds since the epoch."""
    # The 22nd field; the second, in parentheses, may have spaces.
    ticks = int((proc / "self/stat").read_text().rpartition(")")[2].split()[19])
    since_boot = ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """One rank after the other: who looks has nobody remove or make what it looks at."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:  # whoever has it, a start must not wait for it
                return False
            time.sleep(0.01)
