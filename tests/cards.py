"""One imitated card after another in a process, and what was asked of each."""

from __future__ import annotations

import gc
import random
from collections import Counter
from dataclasses import replace

import imitation_cuda
import torch
from card import asking
from card.card import CONFIGURATIONS, Call, Card, Configuration

from triton_offload import KVOffloader
from triton_offload.device import driver
from triton_offload.specs import CPULoadStoreSpec, GPULoadStoreSpec
from triton_offload.transfer.pipeline import PipelineOptions

__all__ = ["CONFIGURATIONS", "replace"]

NUM_BLOCKS = 32
#: what makes something, and what ends it, by the driver's own names
MAKES = {
    "cuStreamCreate": "cuStreamDestroy_v2",
    "cuStreamCreateWithPriority": "cuStreamDestroy_v2",
    "cuEventCreate": "cuEventDestroy_v2",
    "cuMemAlloc_v2": "cuMemFree_v2",
    "cuMemHostAlloc": "cuMemFreeHost",
    "cuMemHostRegister_v2": "cuMemHostUnregister",
}


def use(configuration: Configuration | str) -> Card:
    """Another card, of which nothing has been asked yet."""
    if isinstance(configuration, str):
        configuration = CONFIGURATIONS[configuration]
    driver.context_of.cache_clear()
    imitation_cuda.use(configuration)
    asking.use(0)
    return imitation_cuda.card


def left(card: Card, first: int = 0) -> dict[str, int]:
    """How many things were made and not ended since there were `first` calls, by what ends them."""
    gc.collect()
    made: Counter[str] = Counter()
    ends = set(MAKES.values())
    for call in card.calls(first):
        if call.result == 0:
            if call.name in MAKES:
                made[MAKES[call.name]] += 1
            elif call.name in ends:
                made[call.name] -= 1
            elif call.name == "cuMemFreeAsync":  # torch's own
                made["cuMemFree_v2"] -= 1
    return {name: count for name, count in made.items() if count}


def named(card: Card, *names: str, first: int = 0) -> list[Call]:
    """The calls of these entry points."""
    return [call for call in card.calls(first) if call.name in names]


def cache(index: int = 0, page_bytes: int = 4096) -> torch.Tensor:
    """uint8 [NUM_BLOCKS, page_bytes] on the card, each byte different from its neighbours."""
    generator = torch.Generator().manual_seed(index)
    pages = torch.randint(0, 256, (NUM_BLOCKS, page_bytes), dtype=torch.uint8, generator=generator)
    return pages.to(torch.device("cuda", index))


class Transfers:
    """An offloader of one cache, and chunks that go out and come back."""

    def __init__(self, path: str = "auto", index: int = 0, **options: object) -> None:
        self.cache = cache(index)
        self._random = random.Random(0)
        self._count = 0
        self.offloader = KVOffloader(
            [self.cache],
            "2MiB",
            calibration="off",
            options=PipelineOptions(
                path=None if path == "auto" else path, buffer_bytes=64 << 10, **options
            ),
        )

    def __enter__(self) -> Transfers:
        self.offloader._pool.wait_ready(60)
        return self

    def __exit__(self, *_: object) -> None:
        self.offloader.close(60)

    @property
    def device(self):
        return self.offloader._pool.device

    def store(self, **options):
        """Chunks of random blocks. The job, and what brings them back and looks at every byte."""
        self._count += 1
        blocks = self._random.sample(range(NUM_BLOCKS), 24)
        keys = [b"%d-%d" % (self._count, i) for i in range(12)]
        before = self.cache.cpu()
        job = self.offloader.store(keys, blocks[:12], **options)

        def check(**options) -> None:
            job.wait(60)
            self.offloader.load(keys, blocks[12:], **options).wait(60)
            before[blocks[12:]] = before[blocks[:12]]
            assert torch.equal(self.cache.cpu(), before)

        return job, check

    def scattered(self) -> None:
        """Every second slot, so that no copy moves two chunks; there and back."""
        queue = self.offloader._queue
        blocks = self._random.sample(range(NUM_BLOCKS), 24)
        slots = CPULoadStoreSpec(range(100, 124, 2), fresh=True)
        before = self.cache.cpu()
        queue.wait([queue.transfer_async(GPULoadStoreSpec(blocks[:12]), slots)])
        queue.wait([queue.transfer_async(slots, GPULoadStoreSpec(blocks[12:]))])
        results = queue.get_finished()
        assert [result.error for result in results] == [None] * 2
        before[blocks[12:]] = before[blocks[:12]]
        assert torch.equal(self.cache.cpu(), before)

    def there_and_back(self, times: int = 3) -> None:
        for _ in range(times):
            self.store()[1]()
