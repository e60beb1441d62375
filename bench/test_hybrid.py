"""Hit rate and bytes of a pool that two groups of a hybrid model share, on a trace of requests.

    python -m pytest bench/test_hybrid.py -s

Needs the trace that tests/test_trace_hit_rates.py describes. The model has 10 layers of full
attention and 30 of a sliding window; a chunk is 160 KiB of the ones and 1920 KiB of the others. Its
requests are made from the trace by this rule: a request stores all of its chunks of the first
group, and of the second the last `WINDOW` ones, for no layer of that looks further back. So many of
its leading chunks are hits as there are of the first group, but for those at the end at which the
second does not have the last `WINDOW`. What it loads is touched in both groups.

Compared are, in pools of the same bytes: one slot size, with room for all tensors in each, as it
was; slots as large as the group needs; and a pool that nothing is lost of, from which the oldest
chunks leave one by one, whatever their size, which no memory can do without moving what stays.
Nothing here is timed.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
from timing import note

from triton_offload.scheduler.manager import CPUOffloadingManager
from triton_offload.slabs import Slabs

KIB, GIB = 1 << 10, 1 << 30
FULL, WINDOWED = 0, 1
SLOT_BYTES = (160 * KIB, 1920 * KIB)
WINDOW = 2  # chunks
POLICY = "lru"


DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "traces"
TRACE = (
    Path(os.environ.get("TRITON_OFFLOAD_TRACES") or DEFAULT_FOLDER) / "mooncake_conversation.jsonl"
)

Request = list[int]


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    if not TRACE.is_file():
        pytest.skip(f"no trace at {TRACE}")
    with TRACE.open() as lines:
        return [json.loads(line)["hash_ids"] for line in lines]


class Pool(Protocol):
    """What the rule asks of one. Keys are of one group each."""

    @property
    def used_bytes(self) -> int:
        """Of the pages in it."""

    def lookup(self, keys: Sequence[bytes]) -> int: ...

    def touch(self, keys: Sequence[bytes]) -> None: ...

    def store(self, keys: Sequence[bytes], group: int) -> int:
        """How many chunks were evicted for these."""


class Managed:
    """Ours. `slabs`: of slots of each group's own size, or of one for all."""

    def __init__(self, slabs: Slabs) -> None:
        self._manager = CPUOffloadingManager(slabs, POLICY)
        self._several = len(slabs.sizes) > 1
        self._held = [0, 0]  # chunks of each group

    @property
    def used_bytes(self) -> int:
        return sum(n * size for n, size in zip(self._held, SLOT_BYTES, strict=True))

    def lookup(self, keys: Sequence[bytes]) -> int:
        return self._manager.lookup(keys)

    def touch(self, keys: Sequence[bytes]) -> None:
        self._manager.touch(keys)

    def store(self, keys: Sequence[bytes], group: int) -> int:
        output = self._manager.prepare_store(keys, size=group if self._several else 0)
        assert output is not None
        self._manager.touch(keys)
        self._manager.complete_store(output.keys_to_store)
        self._held[group] += len(output.keys_to_store)
        for key in output.evicted_keys:
            self._held[key[-1]] -= 1
        return len(output.evicted_keys)


class Fluid:
    """A pool without slots."""

    def __init__(self, num_bytes: int) -> None:
        self._room = num_bytes
        self._order: OrderedDict[bytes, None] = OrderedDict()
        self.used_bytes = 0

    def lookup(self, keys: Sequence[bytes]) -> int:
        return next((i for i, key in enumerate(keys) if key not in self._order), len(keys))

    def touch(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            if key in self._order:
                self._order.move_to_end(key)

    def store(self, keys: Sequence[bytes], group: int) -> int:
        new = [key for key in keys if key not in self._order]
        self.used_bytes += len(new) * SLOT_BYTES[group]
        self._order.update(dict.fromkeys(new))
        self.touch(keys)
        evicted = 0
        while self.used_bytes > self._room:
            key, _ = self._order.popitem(last=False)
            self.used_bytes -= SLOT_BYTES[key[-1]]
            evicted += 1
        return evicted


@dataclass(frozen=True)
class Found:
    """`hit_rate`: hits of all chunks asked for. `used`: the part of the pool that held pages, in
    the mean over the requests from the first eviction on. `first`: that part when it began."""

    hit_rate: float
    used: float
    first: float


def key_of(number: int, group: int) -> bytes:
    return number.to_bytes(32, "little") + group.to_bytes(4, "big")


def replay(pool: Pool, requests: list[Request], num_bytes: int) -> Found:
    hits = asked = 0
    used: list[int] = []
    first = 0
    for numbers in requests:
        full = [key_of(number, FULL) for number in numbers]
        windowed = [key_of(number, WINDOWED) for number in numbers]
        found = pool.lookup(full)
        while found and pool.lookup(last := windowed[max(0, found - WINDOW) : found]) < len(last):
            found -= 1
        hits += found
        asked += len(numbers)
        pool.touch(windowed[max(0, found - WINDOW) : found])
        pool.touch(full[:found])
        before = pool.used_bytes
        evicted = pool.store(windowed[-WINDOW:], WINDOWED) + pool.store(full, FULL)
        if evicted and not used:
            first = before
        if evicted or used:
            used.append(pool.used_bytes)
    mean = sum(used) / len(used) / num_bytes if used else 0.0
    return Found(hits / asked, mean, first / num_bytes)


@pytest.mark.parametrize("gib", [4, 16, 64])
def test_hits_and_bytes_of_a_hybrid_model(
    benchmark: Any,
    requests: list[Request],
    gib: int,
) -> None:
    num_bytes = gib * GIB
    pools: dict[str, Pool] = {
        "one size": Managed(Slabs.fit(num_bytes, [sum(SLOT_BYTES)])),
        "own sizes": Managed(Slabs.fit(num_bytes, SLOT_BYTES)),
        "without slots": Fluid(num_bytes),
    }
    found = {name: replay(pool, requests, num_bytes) for name, pool in pools.items()}
    print()
    for name, each in found.items():
        print(
            f"{gib} GiB, {name}: {each.hit_rate:.4f} of the chunks were hits, pages in "
            f"{each.used:.3f} of the bytes (in {each.first:.3f} when it first evicted)"
        )
    benchmark.pedantic(lambda: None, rounds=1)
    note(benchmark, "hybrid", gib=gib)
    benchmark.extra_info |= {name: each.hit_rate for name, each in found.items()}
