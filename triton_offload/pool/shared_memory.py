"""Host memory that several processes map: a file that has a name only until all have mapped it.

Whoever returns from `create` or `join` knows that the name is gone: no other process can open the
memory by then, and it goes with the last of those that mapped it, however they end.
"""

from __future__ import annotations

import mmap
import os
import stat
import time
from contextlib import suppress

_POLL_SECONDS = 0.002
# No link is followed, neither at creation nor by those that join.
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


def create(path: str, num_bytes: int, num_ranks: int, timeout: float) -> mmap.mmap:
    """Make the file, wait until `num_ranks - 1` others have joined, unlink it.

    It is made exclusively and for this user alone. Raises FileExistsError where the path is taken
    (by a link too), TimeoutError where one of the others does not come, RuntimeError where one
    gave up, OSError where memory is out; the file is gone in every case.
    """
    handle = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.fchmod(handle, 0o600)  # whatever the umask took away
        _take(handle, path, num_bytes)
        memory = mmap.mmap(handle, num_bytes)
        _wait_for_all(handle, path, num_bytes, num_ranks, time.monotonic() + timeout)
        return memory
    finally:
        unlink(handle, path)
        os.close(handle)


def join(path: str, num_bytes: int, num_ranks: int, timeout: float) -> mmap.mmap:
    """Map what another process makes, or is about to make, with `create`.

    `timeout`: seconds in which nothing happens. Raises PermissionError for what is not a file of
    this user alone, ValueError for another size, TimeoutError where the file or another rank does
    not come, RuntimeError where another gave up. A rank that gives up takes the file's name with
    it: its maker may be gone, and the others see by it that they wait in vain.
    """
    handle = _open(path, time.monotonic() + timeout)
    try:
        _check_private(handle, path)
        try:
            _wait_for_maker(handle, path, timeout)
            _check_size(handle, path, num_bytes, num_ranks)
            memory = mmap.mmap(handle, num_bytes)
            # Each that joins appends one byte: the file's size counts them, and none is lost.
            os.write(handle, b"\0")
            _wait_for_all(handle, path, num_bytes, num_ranks, time.monotonic() + timeout)
        finally:
            unlink(handle, path)
        return memory
    finally:
        os.close(handle)


def _take(handle: int, path: str, num_bytes: int) -> None:
    """Give the file its size, and all of its memory: what is touched where there is none, in a full
    /dev/shm, kills the process (SIGBUS)."""
    try:
        os.posix_fallocate(handle, 0, num_bytes)  # its size is there when all else is
    except OSError as error:
        text = f"no {num_bytes} bytes for the host pool: {error.strerror}"
        raise OSError(error.errno, text, path) from error


def _wait_for_maker(handle: int, path: str, timeout: float) -> None:
    """Until the file has its size; while its memory is being taken, for as long as that takes."""
    blocks, deadline = 0, time.monotonic() + timeout
    while (found := os.fstat(handle)).st_size == 0:
        if found.st_blocks != blocks:
            blocks, deadline = found.st_blocks, time.monotonic() + timeout
        _pause(deadline, f"path: {path} was not made ready")


def _open(path: str, deadline: float) -> int:
    while True:
        try:
            return os.open(path, _FLAGS | os.O_APPEND)
        except FileNotFoundError:
            _pause(deadline, f"path: {path} was not made")


def _check_private(handle: int, path: str) -> None:
    """Refuse what somebody else put there, or could read."""
    found = os.fstat(handle)
    private = stat.S_ISREG(found.st_mode) and not stat.S_IMODE(found.st_mode) & 0o077
    if not private or found.st_uid != os.geteuid():
        raise PermissionError(f"path: expected a file of this user alone, got another in {path}")


def _check_size(handle: int, path: str, num_bytes: int, num_ranks: int) -> None:
    size = os.fstat(handle).st_size
    if not num_bytes <= size < num_bytes + num_ranks - 1:
        raise ValueError(
            f"path: expected a pool of {num_bytes} bytes for {num_ranks} ranks, "
            f"got {size} bytes in {path}"
        )


def _wait_for_all(handle: int, path: str, num_bytes: int, num_ranks: int, deadline: float) -> None:
    everybody = num_bytes + num_ranks - 1
    while True:
        gone = os.fstat(handle).st_nlink == 0
        size = os.fstat(handle).st_size  # asked second: the name goes when all have come
        if size == everybody:
            return
        missing = f"path: {size - num_bytes + 1} of {num_ranks} ranks have mapped {path}"
        if size > everybody or gone:
            raise RuntimeError(f"{missing}, and one of them gave up")
        _pause(deadline, missing)


def _pause(deadline: float, what: str) -> None:
    if time.monotonic() >= deadline:
        raise TimeoutError(f"{what} in time")
    time.sleep(_POLL_SECONDS)


def unlink(handle: int, path: str) -> None:
    """Take the name of an open file away, unless it stands for another file, or none, by now."""
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(handle), os.lstat(path)):
            os.unlink(path)
