"""Life and death of an offloader: dropped, forked, closed twice, closed while all goes wrong."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time

import pytest
import torch
from gated import GatedDevice

from triton_offload import KVOffloader
from triton_offload.pool.host_pool import HostPool
from triton_offload.transfer.queue_manager import OffloadingQueueManager


def run(program: str, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def our_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("triton-offload")]


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


DROP = """
import gc, os, sys, threading, time, warnings
import torch
from triton_offload import KVOffloader

def resident():  # bytes
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

kv = [torch.zeros(64, 4096, dtype=torch.uint8)]
with KVOffloader(kv, "1MiB") as offloader:
    offloader.store([b"k"], [1]).wait()
gc.collect()
threads, before = threading.active_count(), resident()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for i in range(20):
        offloader = KVOffloader(kv, "64MiB")
        offloader._pool.wait_ready(60)
        for j in range(50):
            offloader.store([b"%d" % j], [j])
        del offloader
        gc.collect()
told = [each for each in caught if each.category is ResourceWarning]
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    gc.collect()
    if threading.active_count() <= threads and resident() - before < 128 << 20:
        break
    time.sleep(0.05)
print(len(told), threading.active_count() - threads, resident() - before < 128 << 20)
print(told[0].message)
"""


def test_what_is_dropped_without_close_is_freed_and_said():
    done = run(DROP)
    assert done.returncode == 0, done.stderr
    counts, message = done.stdout.splitlines()
    assert counts == "20 0 True"
    assert "dropped without close()" in message


def test_what_is_dropped_is_freed_where_warnings_are_errors(monkeypatch):
    failures = []
    monkeypatch.setattr(sys, "unraisablehook", lambda note: failures.append(note.exc_value))
    before = our_threads()
    offloader = KVOffloader([torch.zeros(8, 64)], "64KiB")
    offloader.store([b"a"], [1])
    del offloader
    gc.collect()
    wait_for(lambda: our_threads() == before, 20)
    assert [type(error) for error in failures] == [ResourceWarning]


FORK = """
import os, sys
import torch
from triton_offload import KVOffloader

kv = [torch.zeros(64, 4096, dtype=torch.uint8)]
with KVOffloader(kv, "1MiB") as offloader:
    kv[0][5] = 7
    ended = offloader.store([b"k"], [5])
    ended.wait()
    jobs = [offloader.store([b"%d" % i], [i]) for i in range(64)]
    # The worst moment: another thread holds the lock, and will never release it in the child.
    offloader._lock.__enter__()
    child = os.fork()
    if child == 0:
        calls = [
            lambda: offloader.store([b"x"], [1]),
            lambda: offloader.load([b"k"], [1]),
            lambda: offloader.lookup([b"k"]),
            lambda: offloader.touch([b"k"]),
            lambda: offloader.get_finished(),
            lambda: offloader.cancel(jobs[0]),
            lambda: offloader.take_events(),
            lambda: offloader.reset(),
            lambda: offloader.stats(),
            lambda: jobs[-1].wait() if not jobs[-1]._result else offloader.stats(),
            lambda: jobs[-1].done if not jobs[-1]._result else offloader.stats(),
        ]
        wrong = 0
        for i, call in enumerate(calls):
            try:
                call()
            except RuntimeError as error:
                wrong += "fork" not in str(error)
            else:
                print("no error from", i)
                wrong += 1
        assert ended.wait().success  # a result is a result
        offloader.close()
        with KVOffloader(kv, "1MiB") as own:  # it can make its own
            own.store([b"k"], [5]).wait()
            own.load([b"k"], [6]).wait()
            wrong += not bool((kv[0][6] == 7).all())
        sys.exit(wrong)
    offloader._lock.__exit__(None, None, None)
    _, status = os.waitpid(child, 0)
    for job in jobs:
        job.wait()
    sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_fork_meets_an_error_at_once_and_can_make_its_own():
    done = run(FORK)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


@pytest.mark.parametrize("step", ["shutdown", "pool"])
def test_a_close_that_fails_frees_the_rest_and_can_be_tried_again(monkeypatch, step):
    device = GatedDevice()
    before = our_threads()
    offloader = KVOffloader([torch.zeros(8, 64)], "64KiB", device=device)
    job = offloader.store([b"a"], [1])
    cls, name = {
        "shutdown": (OffloadingQueueManager, "shutdown"),
        "pool": (HostPool, "close"),
    }[step]
    real, count = getattr(cls, name), [0]

    def fails(self, *args):
        count[0] += 1
        real(self, *args)
        if count[0] <= 2:
            raise OSError(f"injected {count[0]}")

    monkeypatch.setattr(cls, name, fails)
    for number in (1, 2):
        with pytest.raises(OSError, match=f"injected {number}"):
            offloader.close(60)
        assert our_threads() == before
    offloader.close()
    assert count[0] == 3
    offloader.close()
    assert count[0] == 3
    assert job.wait().success


def test_the_timeout_of_close_is_one_for_all_its_steps(monkeypatch):
    offloader = KVOffloader([torch.zeros(8, 64)], "64KiB")
    asked = []
    wait, shutdown = offloader._queue.wait, offloader._queue.shutdown

    def slow_wait(job_ids, timeout=None):
        asked.append(timeout)
        time.sleep(0.05)
        wait(job_ids, timeout)

    def note_shutdown(timeout=None):
        asked.append(timeout)
        shutdown(60)

    monkeypatch.setattr(offloader._queue, "wait", slow_wait)
    monkeypatch.setattr(offloader._queue, "shutdown", note_shutdown)
    offloader.close(30)
    assert asked[0] <= 30
    assert asked[1] <= asked[0] - 0.05
