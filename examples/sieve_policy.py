"""An eviction policy of one's own: SIEVE (Zhang et al., NSDI 2024), beside LRU on one trace.

    python examples/sieve_policy.py

SIEVE keeps keys in the order of their arrival, with one bit each: used since the hand last passed.
The hand goes from the oldest key to the newest and round again; it clears the bit of a key that was
used, and evicts the first that was not. What was asked for once and never again leaves soon,
without a second queue.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet

import torch

from triton_offload import EvictionPolicy, KVOffloader

BLOCKS_PER_REQUEST = 8
NUM_CHUNKS = 200
NUM_REQUESTS = 1_000


class SIEVEPolicy(EvictionPolicy):
    """One queue in two parts, cut where the hand is: `_ahead` it has yet to pass, up to the newest
    key; `_behind` it has passed in this round. Both map a key to its bit.

    Of the chunks that one call stored, the last is the older one, so that it leaves first; what was
    used since has lost that order.
    """

    def __init__(self, num_chunks: int) -> None:
        self._num_chunks = num_chunks
        self._ahead: OrderedDict[bytes, bool] = OrderedDict()
        self._behind: OrderedDict[bytes, bool] = OrderedDict()

    def admit(self, keys: Sequence[bytes]) -> None:
        self._go_round()
        for key in reversed(keys):
            self._ahead[key] = False

    def land(self, keys: Sequence[bytes]) -> None:
        pass  # a transfer moves nothing

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            del self._part_of(key)[key]

    def refresh(self, keys: Sequence[bytes]) -> None:
        pass  # a place is that of the arrival

    def touch(self, keys: Sequence[bytes], pending: Collection[bytes] = ()) -> None:
        for key in keys:
            if key not in pending:
                self._part_of(key)[key] = True

    def evict(
        self, count: int, protected: AbstractSet[bytes], busy: Sequence[AbstractSet[bytes]] = ()
    ) -> list[bytes]:
        evicted: list[bytes] = []
        while len(evicted) < count:  # there are as many, says the caller
            self._go_round()
            key, used = self._ahead.popitem(last=False)
            if used or key in protected or any(key in keys for keys in busy):
                self._behind[key] = False
            else:
                evicted.append(key)
        return evicted

    def release(self, keys: Sequence[bytes]) -> None:
        pass  # what is busy is passed over, whenever the hand comes by

    def clear(self) -> None:
        self._ahead.clear()
        self._behind.clear()

    def _go_round(self) -> None:
        """Behind the newest key the hand goes on at the oldest."""
        if not self._ahead:
            self._ahead, self._behind = self._behind, self._ahead

    def _part_of(self, key: bytes) -> OrderedDict[bytes, bool]:
        return self._ahead if key in self._ahead else self._behind

    def _check(self, keys: Collection[bytes], busy: AbstractSet[bytes]) -> None:
        """For tests: exactly these keys are known, each once."""
        assert sorted([*self._ahead, *self._behind]) == sorted(keys)
        assert len(keys) <= self._num_chunks


def requests(number: int) -> Iterator[list[bytes]]:
    """Prompts: some documents that are asked about again and again, most of them once."""
    dice = random.Random(0)
    for i in range(number):
        name = f"document {int(dice.paretovariate(0.7))}" if dice.random() < 0.5 else f"once {i}"
        yield [f"{name}, chunk {chunk}".encode() for chunk in range(BLOCKS_PER_REQUEST)]


def hit_rate(policy: type[EvictionPolicy] | None) -> float:
    """The share of chunks that were found in host memory. None: LRU."""
    kv_caches = [torch.zeros(BLOCKS_PER_REQUEST, 64, dtype=torch.uint8)]
    blocks = range(BLOCKS_PER_REQUEST)
    with KVOffloader(kv_caches, NUM_CHUNKS * 64, policy=policy or "lru") as offloader:
        for keys in requests(NUM_REQUESTS):
            hits = offloader.lookup(keys)
            offloader.load(keys[:hits], blocks[:hits]).wait()
            # ... here an engine computes the rest ...
            offloader.store(keys[hits:], blocks[hits:], first_block=hits).wait()
        stats = offloader.stats()
        return stats.hits / stats.lookups


def main() -> None:
    print(f"LRU    {hit_rate(None):6.1%} of chunks found")
    print(f"SIEVE  {hit_rate(SIEVEPolicy):6.1%} of chunks found")


if __name__ == "__main__":
    main()
