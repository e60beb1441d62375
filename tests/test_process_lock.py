"""The lock that a forked child meets with an error."""

from __future__ import annotations

import os
import threading

import pytest

from triton_offload.process_lock import ProcessLock


def test_a_thread_holds_it_as_often_as_it_likes_and_keeps_others_out():
    lock = ProcessLock("thing")
    entered = threading.Event()

    def enter() -> None:
        with lock:
            entered.set()

    with lock:
        done = threading.Event()

        def again() -> None:
            with lock, lock:
                done.set()

        again_thread = threading.Thread(target=again, daemon=True)
        other = threading.Thread(target=enter, daemon=True)
        other.start()
        again_thread.start()
        nested = threading.Event()
        holder = threading.Thread(target=nested.set)
        holder.start()
        assert nested.wait(10)
        assert not entered.wait(0.05)
    assert entered.wait(10)
    assert done.wait(10)
    assert not lock.foreign


def test_a_fork_has_an_error_in_its_place_whoever_held_it():
    lock = ProcessLock("thing")
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            release.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(10)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with lock:
                status = 2
        except RuntimeError as error:
            ours = "thing: expected use by process" in str(error) and "fork" in str(error)
            status = 0 if ours and lock.foreign else 3
        finally:
            os._exit(status)
    release.set()
    holder.join()
    for _ in range(500):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        threading.Event().wait(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the fork waits for ever")
    assert os.waitstatus_to_exitcode(status) == 0
