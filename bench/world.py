"""What is moved: caches, a host pool, and which blocks go to which slots."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from sizes import HAS_GPU, SIZES
from timing import DEVICE

from triton_offload.device import device_for
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import Direction, Ids
from triton_offload.transfer.layout import CacheLayout

TENSORS = 16
RANKS = 4
GROUPS = 8


def jobs(limit: int = SIZES.job_bytes) -> list[tuple[int, int]]:
    """(page bytes, pages): the grid, each page size up to `limit` bytes or the most pages.

    The largest job of every page size comes first, then the next: a run that is cut short still
    has all page sizes.
    """
    found = []
    for page_bytes in SIZES.page_bytes:
        most = min(SIZES.pages[-1], limit // page_bytes) // TENSORS * TENSORS
        counts = [most, *(count for count in reversed(SIZES.pages) if count < most)]
        found += [(rank, page_bytes, count) for rank, count in enumerate(counts)]
    return [(page_bytes, count) for _, page_bytes, count in sorted(found)]


@dataclass
class World:
    """Caches of some tensors on the device, and half of their blocks, to be moved.

    Block ids are at random. `slots`:
    `adjacent`: in order. `recycled`: as a list of free slots hands them out after requests have
    come and gone, the last freed first. `ranks`: recycled, and each row of the pool belongs to
    four ranks of which this is one. `groups`: adjacent, the layout has GROUPS groups, and what
    moves is one of them, every GROUPS-th tensor. `duplex`: adjacent, and loads take the blocks and
    slots that stores don't, so that both can run at once.
    """

    page_bytes: int
    caches: list[torch.Tensor]
    layout: CacheLayout
    block_ids: Ids
    slot_ids: Ids
    load_block_ids: Ids
    load_slot_ids: Ids
    slots: str
    num_slots: int

    @classmethod
    def build(
        cls, page_bytes: int, pages: int, slots: str = "adjacent", tensors: int = TENSORS
    ) -> World:
        moved = len(range(0, tensors, GROUPS)) if slots == "groups" else tensors
        count = max(1, pages // moved)
        num_blocks = 2 * count
        caches = [
            torch.randint(0, 127, (num_blocks, page_bytes), dtype=torch.int8, device=DEVICE)
            for _ in range(tensors)
        ]
        groups = None
        if slots == "groups":
            groups = [
                [(i, page_bytes) for i in range(group, tensors, GROUPS)] for group in range(GROUPS)
            ]
        layout = CacheLayout(caches, groups=groups)
        blocks = np.random.default_rng(0).permutation(num_blocks).astype(np.int64)
        recycled = slots in ("recycled", "ranks")
        num_slots = num_blocks if recycled or slots == "duplex" else count
        order = recycled_slots(num_slots) if recycled else np.arange(num_slots, dtype=np.int64)
        stored = slice(0, count)
        loaded = slice(count, 2 * count) if slots == "duplex" else stored
        return cls(
            page_bytes,
            caches,
            layout,
            blocks[stored],
            order[stored],
            blocks[loaded],
            order[loaded],
            slots,
            num_slots,
        )

    def ids(self, direction: Direction) -> tuple[Ids, Ids]:
        """(blocks, slots) of the job of one direction."""
        if direction is Direction.STORE:
            return self.block_ids, self.slot_ids
        return self.load_block_ids, self.load_slot_ids

    @property
    def moved(self) -> list[torch.Tensor]:
        """The caches that take part: all, or those of the first group."""
        return self.caches[::GROUPS] if self.slots == "groups" else self.caches

    @property
    def num_bytes(self) -> int:
        return len(self.block_ids) * len(self.moved) * self.page_bytes

    def pool(self) -> HostPool:
        """A pool with room for `num_slots`, touched and (on a GPU) pinned."""
        device = device_for(DEVICE)
        slot_bytes = self.layout.slot_bytes
        if self.slots != "ranks":
            pool = HostPool.allocate(device, self.num_slots, slot_bytes)
            pool.wait_ready(120)
            return pool
        rows = torch.zeros(
            (self.num_slots, RANKS * slot_bytes), dtype=torch.uint8, pin_memory=HAS_GPU
        )
        rank = rows[:, slot_bytes : 2 * slot_bytes]
        return HostPool.from_tensor(device, rank, pinned=True)


def recycled_slots(num_slots: int) -> Ids:
    """All slots as a stack of free ones hands them out, after requests of 2 to 64 chunks took them
    in order and ended in a random order: each request's come back last in, first out."""
    rng = random.Random(0)
    requests = []
    begin = 0
    while begin < num_slots:
        end = min(num_slots, begin + rng.randint(2, 64))
        requests.append(list(range(begin, end)))
        begin = end
    rng.shuffle(requests)
    free = [slot for request in requests for slot in request]
    return np.array(free[::-1], dtype=np.int64)
