"""Ends in many ways while transfers are under way; prints (exit status, standard error) of each.

Every end is that of a forked child, which imports torch no more: python exit_script.py FOLDER TURNS
"""

from __future__ import annotations

import atexit
import json
import os
import random
import sys
import time
from pathlib import Path

late: list = []
atexit.register(lambda: [each.close(60) for each in late])  # before ours: it is called after it

import torch  # noqa: E402

from triton_offload import KVOffloader  # noqa: E402


def begin(path: str) -> KVOffloader:
    """With some seconds of loads under way, on every thread that there is."""
    torch.set_num_threads(1)
    tensors = [torch.zeros(64, 16384, dtype=torch.uint8) for _ in range(8)]
    offloader = KVOffloader(tensors, "8MiB", path=path)
    keys = [b"%d" % i for i in range(64)]
    offloader.store(keys, range(64)).wait(60)
    for _ in range(200):
        offloader.load(keys, random.sample(range(64), 64), expedited=random.random() < 0.5)
    return offloader


def in_child(stderr: Path, run) -> tuple[int, str] | None:
    """Its end, or None in the child, which goes on to its own."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        run()
        return None
    deadline = time.monotonic() + 60
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), stderr.read_text()
        if time.monotonic() > deadline:
            os.kill(pid, 9)
        time.sleep(0.002)


def exits() -> None:
    begin("auto")
    sys.exit(3)


def fails() -> None:
    begin("zero_copy")
    raise KeyError("mine")


def ends() -> None:
    globals()["kept"] = begin("staged")


def closes_late() -> None:
    late.append(begin("copy_engine"))


def forks() -> None:
    """The child of this process has the offloader, but not its threads."""
    offloader = begin("staged")
    end = in_child(folder / "inner", lambda: sys.exit(5))
    assert end == (5, ""), end
    offloader.close(60)


folder = Path(sys.argv[1])
WAYS = {run.__name__: run for run in (ends, fails, exits, closes_late, forks)}


def main() -> None:
    found: dict[str, list] = {}
    for name, run in WAYS.items():
        for _ in range(int(sys.argv[2])):
            end = in_child(folder / name, run)
            if end is None:
                return
            found.setdefault(name, []).append(end)
    print(json.dumps(found))


main()
