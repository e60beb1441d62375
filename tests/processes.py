"""Which processes belong together, and which shared memory they have, from /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path


def session(leader: int | None = None) -> dict[int, str]:
    """The names of a session's processes by id, its leader's too, but for zombies.

    `leader`: the process that the session began with; None: this process's own session.
    """
    leader = os.getsid(0) if leader is None else leader
    found = {}
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdigit():
                before, _, after = (folder / "stat").read_text().rpartition(")")
                state, _, _, of_session = after.split()[:4]
                if int(of_session) == leader and state != "Z":
                    found[int(folder.name)] = before.partition("(")[2]
    return found


def shared_files(processes: Iterable[int]) -> set[str]:
    """The files in /dev/shm that these processes have mapped and that have a name."""
    lines: list[str] = []
    for process in processes:
        with suppress(OSError):
            lines += Path(f"/proc/{process}/maps").read_text().splitlines()
    names = {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line}
    return {name for name in names if not name.endswith(" (deleted)")}


def wait_until(what: Callable[[], bool], why: Callable[[], object], seconds: float = 120) -> None:
    """Until `what` is true; a test that waited for so long fails with `why`."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, why()
        time.sleep(0.1)
