"""What the processes of a session have: who they are, their memory, what they share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path


def of_session(leader: int | None = None) -> dict[int, str]:
    """The names of a session's processes by id, its leader's too, but for zombies.

    `leader`: the process that the session began with; None: this process's own session.
    """
    leader = os.getsid(0) if leader is None else leader
    found = {}
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdigit():
                before, _, after = (folder / "stat").read_text().rpartition(")")
                state, _, _, session = after.split()[:4]
                if int(session) == leader and state != "Z":
                    found[int(folder.name)] = before.partition("(")[2]
    return found


def resident_bytes(processes: Iterable[int]) -> int:
    """Of all of them together; what they share counts as often as it is mapped."""
    total = 0
    for process in processes:
        with suppress(OSError):
            for line in Path(f"/proc/{process}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    total += int(line.split()[1]) << 10
    return total


def shared_files(processes: Iterable[int]) -> set[Path]:
    """Their files in `/dev/shm` that have a name still."""
    found = set()
    for process in processes:
        with suppress(OSError):
            for line in Path(f"/proc/{process}/maps").read_text().splitlines():
                path = line.partition("/dev/shm/")[2]
                if path and not path.endswith(" (deleted)"):
                    found.add(Path("/dev/shm") / path)
    return found


def wait_until(what: Callable[[], bool], why: Callable[[], object], seconds: float = 120) -> None:
    """Raises AssertionError with `why()` where it did not become true."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, why()
        time.sleep(0.1)
