"""What counts as a use of a chunk, and what shows that it is there, for a program."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from gated import GatedDevice

from triton_offload import KVOffloader

ONE, TWO, THREE, FOUR, FIVE = (bytes([i]) for i in range(1, 6))


def offloader(policy: str, num_chunks: int = 4, device: Any = None) -> KVOffloader:
    caches = [torch.arange(8 * 16, dtype=torch.uint8).reshape(8, 16)]
    return KVOffloader(caches, host_bytes=16 * num_chunks, policy=policy, device=device)


@pytest.mark.parametrize("policy", ["lru", "arc"])
def test_of_a_prefix_that_was_stored_in_two_jobs_the_tail_leaves_first(policy: str) -> None:
    with offloader(policy) as kv:
        kv.store([ONE, TWO], [0, 1]).wait()
        kv.store([ONE, TWO, THREE, FOUR], [0, 1, 2, 3]).wait()
        kv.store([FIVE], [4]).wait()
        assert kv.lookup([ONE, TWO, THREE, FOUR]) == 3
        assert kv.lookup([FIVE]) == 1


@pytest.mark.parametrize("policy", ["lru", "arc"])
def test_a_growing_prefix_that_is_stored_step_by_step_leaves_from_its_end(policy: str) -> None:
    keys = [bytes([i]) for i in range(8)]
    device = GatedDevice()
    device.gate.clear()  # all are under way: what landed between two steps would be used again
    with offloader(policy, num_chunks=8, device=device) as kv:
        jobs = [kv.store(keys[:n], range(n)) for n in (2, 4, 6, 8)]
        device.gate.set()
        for job in reversed(jobs):
            job.wait()
        for left in range(7, 3, -1):
            kv.store([b"new%d" % left], [0]).wait()
            assert kv.lookup(keys) == left
            for key in keys[left:]:
                assert kv.lookup([key]) == 0


@pytest.mark.parametrize("again", [[ONE], [ONE, THREE]])
def test_a_store_of_known_keys_is_a_use_of_them(again: list[bytes]) -> None:
    with offloader("arc", num_chunks=2) as kv:
        kv.store([ONE], [0]).wait()
        kv.store([TWO], [1]).wait()
        kv.store(again, range(len(again))).wait()  # TWO and what comes after it leave before ONE
        for i in range(4):
            kv.store([b"new%d" % i], [2]).wait()
            assert kv.lookup([ONE]) == 1
        assert kv.lookup([TWO]) == 0


def test_lookup_alone_shows_a_store_that_has_landed() -> None:
    with offloader("lru") as kv:
        kv.store([ONE], [0])
        deadline = time.monotonic() + 30
        while kv.lookup([ONE]) == 0:
            assert time.monotonic() < deadline, "nothing but lookup is called"
            time.sleep(0.001)
