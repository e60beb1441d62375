"""What the bytes of pages and slots must be, said one byte at a time."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from triton_offload.device.host import HostDevice
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import CPULoadStoreSpec, GPULoadStoreSpec, TransferResult
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.pipeline import PipelineOptions
from triton_offload.transfer.queue_manager import OffloadingQueueManager, transfer_queue

POISON = 0xA5


def random_pages(num_blocks: int, page_bytes: int, stride: int, offset: int, seed: int):
    """uint8 [num_blocks, page_bytes] with random bytes, pages `stride` bytes apart, amid poison."""
    generator = torch.Generator().manual_seed(seed)
    storage = torch.full((offset + num_blocks * stride + 64,), POISON, dtype=torch.uint8)
    pages = storage.as_strided((num_blocks, page_bytes), (stride, 1), offset)
    pages.copy_(torch.randint(0, 256, pages.shape, dtype=torch.uint8, generator=generator))
    return pages


def storage_of(tensor: torch.Tensor) -> torch.Tensor:
    """Every byte of the tensor's storage, those between its pages included."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


@dataclass
class World:
    """A cache, a pool and the queue between them, with the means to say what must be where."""

    tensors: list[torch.Tensor]
    layout: CacheLayout
    pool: HostPool
    queue: OffloadingQueueManager

    @classmethod
    def build(
        cls,
        tensors: list[torch.Tensor],
        *,
        blocks_per_chunk: int = 1,
        groups: list[list[tuple[int, int]]] | None = None,
        num_slots: int = 16,
        options: PipelineOptions | None = None,
        device: HostDevice | None = None,
        row_gap: int = 0,
    ) -> World:
        layout = CacheLayout(tensors, blocks_per_chunk, groups)
        device = device or HostDevice()
        if row_gap:
            rows = torch.zeros((num_slots, layout.slot_bytes + row_gap), dtype=torch.uint8)
            pool = HostPool.from_tensor(device, rows[:, : layout.slot_bytes], pinned=True)
        else:
            pool = HostPool.allocate(device, num_slots, layout.slot_bytes)
            pool.wait_ready(60)
        queue = transfer_queue(layout, pool, options=options or PipelineOptions())
        return cls(tensors, layout, pool, queue)

    def close(self) -> None:
        self.queue.shutdown(60)
        self.pool.close()

    def finish(self, *job_ids: int) -> list[TransferResult]:
        self.queue.wait(job_ids, 60)
        return self.queue.get_finished()

    def places(self, group: int, block_ids, slot_ids, first: int):
        """(tensor, block, slot, byte offset in the slot, page bytes) of every page of a run."""
        size = self.layout.blocks_per_chunk
        padded = [t[0].nbytes for t in self.tensors]
        for page in self.layout.groups[group].table.pages:
            tensor = next(
                i for i, t in enumerate(self.tensors) if t.data_ptr() == page.view.data_ptr()
            )
            for i, block in enumerate(block_ids):
                chunk, position = divmod(first % size + i, size)
                offset = size * sum(padded[:tensor]) + position * padded[tensor]
                yield tensor, int(block), int(slot_ids[chunk]), offset, page.page_bytes

    def after_store(self, before: torch.Tensor, group, block_ids, slot_ids, first, fresh):
        """What the pool must hold after a store, given what it held before."""
        after = before.clone()
        for slot, is_fresh in zip(slot_ids, fresh, strict=True):
            if is_fresh:
                after[int(slot)] = 0
        for tensor, block, slot, offset, size in self.places(group, block_ids, slot_ids, first):
            page = self.tensors[tensor][block].contiguous().view(torch.uint8).flatten()
            after[slot, offset : offset + size] = page[:size]
        return after

    def expect_load(self, group, block_ids, slot_ids, first) -> list[torch.Tensor]:
        """What the storages of all tensors must hold after a load."""
        after = [storage_of(t).clone() for t in self.tensors]
        for tensor, block, slot, offset, size in self.places(group, block_ids, slot_ids, first):
            t = self.tensors[tensor]
            start = (t.storage_offset() + block * t.stride(0)) * t.element_size()
            after[tensor][start : start + size] = self.pool.slots[slot, offset : offset + size]
        return after


def store_specs(world: World, group, block_ids, slot_ids, first, fresh):
    return (
        _device_spec(world, group, block_ids, first),
        CPULoadStoreSpec(slot_ids, fresh),
    )


def load_specs(world: World, group, block_ids, slot_ids, first):
    return CPULoadStoreSpec(slot_ids), _device_spec(world, group, block_ids, first)


def _device_spec(world: World, group: int, block_ids, first: int) -> GPULoadStoreSpec:
    count = len(world.layout.groups)
    sizes = [len(block_ids) if g == group else 0 for g in range(count)]
    return GPULoadStoreSpec(block_ids, sizes, [first] * count)


def sample(rng: random.Random, bound: int, count: int, adjacent: bool) -> list[int]:
    """`count` distinct ids below `bound`, in a run or scattered."""
    if adjacent:
        start = rng.randrange(bound - count + 1)
        return list(range(start, start + count))
    return rng.sample(range(bound), count)
