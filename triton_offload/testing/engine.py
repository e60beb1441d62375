"""A serving engine's use of its pages, for simulations: it computes, offloads, loads and reuses.

Requests come, their pages are written (prefill) and read (decode), and are given to others the
moment that they may be. Beside the memory stands a model of it: the bytes as they must be once
everything that was queued so far has run, whatever the order. Kernels of the engine compare what
they read with the model, when they run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from triton_offload.kernels.table import PageTable
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import Ids
from triton_offload.testing.simulated import SimulatedDevice
from triton_offload.transfer.layout import CacheLayout

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Bytes of a small cache. `tensors`: (page bytes, bytes from page to page) each. `groups`:
    (tensor, page bytes) of each group's pages, as for `CacheLayout`; None: one group of all.
    `row_gap`: bytes between two slots of the pool. `slab_bytes`: not 0 for slots that are as large
    as their group needs; then `num_slots` are slabs of so many bytes, which each size cuts."""

    tensors: Sequence[tuple[int, int]] = ((16, 16), (8, 12))
    blocks_per_chunk: int = 2
    groups: Sequence[Sequence[tuple[int, int]]] | None = None
    num_blocks: int = 24
    num_slots: int = 12
    row_gap: int = 0
    slab_bytes: int = 0


class EngineMemory:
    """A cache and a pool on the simulated device, and what must be in them."""

    def __init__(self, device: SimulatedDevice, shape: CacheShape, *, pinned: bool = True) -> None:
        self.device = device
        self.shape = shape
        starts = np.cumsum([0, *(stride * shape.num_blocks + 16 for _, stride in shape.tensors)])
        memory = device.empty(int(starts[-1]))
        self.tensors = [
            memory.as_strided((shape.num_blocks, page), (stride, 1), int(start))
            for (page, stride), start in zip(shape.tensors, starts, strict=False)
        ]
        packed = shape.slab_bytes > 0
        self.layout = CacheLayout(self.tensors, shape.blocks_per_chunk, shape.groups, packed=packed)
        row_bytes = shape.slab_bytes or self.layout.slot_bytes
        rows = torch.zeros((shape.num_slots, row_bytes + shape.row_gap), dtype=torch.uint8)
        if pinned:
            device.register(rows)
        self.pool = HostPool.from_tensor(
            device,
            rows[:, :row_bytes],
            pinned=pinned,
            sizes=self.layout.slot_sizes if packed else (),
        )
        self._rows = rows.numpy()
        self._memory = memory.numpy()
        #: the bytes of the cache, and of the pool, when all that is queued has run
        self.cache = self._memory.copy()
        self.slots = self._rows.copy()
        self._bytes = self.slots.reshape(-1)  # the same memory
        # By slot: where it begins in the pool, and its slab.
        self._begins = np.empty(self.pool.slabs.num_slots, dtype=np.int64)
        self._slabs = np.empty_like(self._begins)
        for size in self.pool.slabs.sizes:
            for slab in range(shape.num_slots):
                for i, slot in enumerate(size.slots(slab)):
                    self._begins[slot] = slab * rows.shape[1] + i * size.num_bytes
                    self._slabs[slot] = slab
        members = shape.groups or [[(i, page) for i, (page, _) in enumerate(shape.tensors)]]
        padded = [page for page, _ in shape.tensors]
        blocks = np.arange(shape.num_blocks)[:, None]
        places = np.arange(shape.blocks_per_chunk)[:, None]
        # By group, [block or position, bytes]: where its pages lie in the cache, and in a slot.
        self._pages: list[Ids] = []
        self._within: list[Ids] = []
        for group in members:
            pages = [
                starts[i] + blocks * shape.tensors[i][1] + np.arange(size) for i, size in group
            ]
            before = {i for i, _ in group} if packed else range(len(padded))
            within = [
                shape.blocks_per_chunk * sum(padded[j] for j in before if j < i)
                + places * padded[i]
                + np.arange(size)
                for i, size in group
            ]
            self._pages.append(np.concatenate(pages, axis=1))
            self._within.append(np.concatenate(within, axis=1))
        self._tables: dict[tuple[int, ...], PageTable] = {}  # of some of a group's pages
        self.wrong: list[str] = []

    # -- the engine's kernels --

    def write(self, group: int, blocks: Sequence[int], rng: random.Random) -> None:
        """Queue a kernel that writes the blocks' pages: prefill, or zeroing."""
        cells = self._pages[group][list(blocks)]
        pattern = np.arange(cells.size, dtype=np.uint8).reshape(cells.shape)
        values = pattern * rng.randrange(256) + np.uint8(rng.randrange(256))
        self.cache[cells] = values
        memory = self._memory

        def run() -> None:
            memory[cells] = values

        self._launch("engine writes", self.layout.groups[group].table, blocks, run, writes=True)

    def read(
        self, group: int, blocks: Sequence[int], tensors: Collection[int] | None = None
    ) -> None:
        """Queue a kernel that reads the blocks' pages, and compares. `tensors`: in these alone, of
        which the group may have none."""
        cells = self._pages[group][list(blocks)]
        table = self.layout.groups[group].table
        if tensors is not None:
            members = self.layout.members[group]
            rows = [row for row, tensor in enumerate(members) if tensor in tensors]
            if not rows:
                return
            sizes = [page.page_bytes for page in table.pages]
            cells = cells[:, np.isin(np.repeat(np.arange(len(sizes)), sizes), rows)]
            key = group, *rows
            if key not in self._tables:
                self._tables[key] = table.group([(row, sizes[row]) for row in rows])
            table = self._tables[key]
        expected = self.cache[cells]
        memory, wrong = self._memory, self.wrong

        def run() -> None:
            found = memory[cells]
            if not np.array_equal(found, expected):
                bad = [
                    block
                    for block, a, b in zip(blocks, found, expected, strict=True)
                    if not np.array_equal(a, b)
                ]
                wrong.append(f"blocks {bad} of group {group}: expected other bytes")

        self._launch("engine reads", table, blocks, run, writes=False)

    # -- what a transfer does to the model, when it is submitted --

    def model_store(
        self, group: int, blocks: Ids, slot_ids: Ids, first: int, fresh: npt.NDArray[np.bool_]
    ) -> None:
        self._bytes[self._cells(group, slot_ids[fresh])] = 0
        chunk, position = np.divmod(first + np.arange(len(blocks)), self.shape.blocks_per_chunk)
        places = self._begins[slot_ids[chunk]][:, None] + self._within[group][position]
        self._bytes[places] = self.cache[self._pages[group][blocks]]

    def model_load(self, group: int, blocks: Ids, slot_ids: Ids, first: int) -> None:
        chunk, position = np.divmod(first + np.arange(len(blocks)), self.shape.blocks_per_chunk)
        places = self._begins[slot_ids[chunk]][:, None] + self._within[group][position]
        self.cache[self._pages[group][blocks]] = self._bytes[places]

    def snapshot(self, group: int, blocks: Ids) -> Bytes:
        """The model's bytes of these blocks, for `restore` where a load was taken back."""
        return self.cache[self._pages[group][blocks]]

    def restore(self, group: int, blocks: Ids, saved: Bytes) -> None:
        self.cache[self._pages[group][blocks]] = saved

    def snapshot_slots(self, group: int, slot_ids: Ids) -> Bytes:
        """The model's bytes of these slots, for `restore_slots` where a store was taken back."""
        return self._bytes[self._cells(group, slot_ids)]

    def restore_slots(self, group: int, slot_ids: Ids, saved: Bytes) -> None:
        self._bytes[self._cells(group, slot_ids)] = saved

    # -- slots --

    def slots_for(self, group: int) -> range:
        """The ids of all slots that the group's chunks may be given."""
        size = self.pool.slabs.sizes[self.layout.groups[group].size]
        return range(size.first, size.first + self.shape.num_slots * size.per_slab)

    def slabs_of(self, slot_ids: Iterable[int]) -> set[int]:
        """Slots of different slabs share no byte; nor do those of one size."""
        return {int(self._slabs[slot]) for slot in slot_ids}

    def _cells(self, group: int, slot_ids: Ids) -> Ids:
        num_bytes = self.pool.slabs.sizes[self.layout.groups[group].size].num_bytes
        return self._begins[slot_ids][:, None] + np.arange(num_bytes)

    # -- comparing --

    def check_reads(self) -> None:
        assert not self.wrong, self.wrong[:3]

    def check_all(self) -> None:
        """Every byte of cache and pool, gaps included. Everything queued must have run."""
        self.check_reads()
        for name, found, expected in (
            ("cache", self._memory, self.cache),
            ("pool", self._rows.ravel(), self.slots.ravel()),
        ):
            bad = np.flatnonzero(found != expected)
            assert not len(bad), f"{name}: {len(bad)} wrong bytes, the first at {bad[0]}"

    def host_reads(self, slot_ids: Sequence[int]) -> None:
        """The host looks at slots, and all that is in their slabs, which must hold what the model
        says."""
        for slab in sorted(self.slabs_of(slot_ids)):
            self.device.touch(reads=[self.pool.slots[slab]])
            assert np.array_equal(self._rows[slab], self.slots[slab]), f"{slab}: wrong bytes"

    def _launch(
        self,
        name: str,
        table: PageTable,
        blocks: Sequence[int],
        run: Callable[[], None],
        *,
        writes: bool,
    ) -> None:
        pages = [self.device.pages_of(table, np.asarray(blocks, dtype=np.int64))]
        self.device.launch(
            name,
            self.device.compute_stream,
            reads=[] if writes else pages,
            writes=pages if writes else [],
            run=run,
        )
