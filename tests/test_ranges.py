"""What a copy engine is asked to move, at the edges: a row, a column, a chunk more or less."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from triton_offload.device.host import HostDevice
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import CPULoadStoreSpec, Direction, GPULoadStoreSpec
from triton_offload.transfer import ranges
from triton_offload.transfer.layout import CacheLayout, GroupRun
from triton_offload.transfer.ranges import (
    ChunkRanges,
    addresses,
    chunk_batches,
    positions,
    whole_chunks,
    zeros_over,
)

MIB = 1 << 20
NUM_SLOTS = 40


class Setting:
    """A run of chunks of one group between a cache, a pool and a staging buffer."""

    def __init__(
        self,
        blocks: list[int],
        slots: list[int],
        *,
        # page bytes, and bytes between
        pages: tuple[tuple[int, int], ...] = ((5, 5), (3, 4), (2, 2)),
        group: tuple[tuple[int, int], ...] | None = None,
        span: int = 1,
        first: int = 0,
        row_gap: int = 0,
        piece_slots: int = NUM_SLOTS,
    ) -> None:
        num_blocks = max([*blocks, 0]) + 1
        self.tensors = [
            torch.empty(num_blocks * stride, dtype=torch.uint8).as_strided(
                (num_blocks, page), (stride, 1)
            )
            for page, stride in pages
        ]
        self.layout = CacheLayout(self.tensors, span, None if group is None else [list(group)])
        rows = torch.zeros((NUM_SLOTS, self.layout.slot_bytes + row_gap), dtype=torch.uint8)
        rows = rows[:, : self.layout.slot_bytes]
        self.pool = HostPool.from_tensor(HostDevice(), rows, pinned=True)
        self.pool.piece_slots = piece_slots
        specs = GPULoadStoreSpec(blocks, None, [first]), CPULoadStoreSpec(slots)
        (self.run,) = self.layout.plan(Direction.LOAD, *specs, NUM_SLOTS)
        packed = self.run.group.packed.slot_bytes
        self.staging = torch.zeros((len(slots), packed), dtype=torch.uint8)

    def bytes_of_chunks(self, skip: tuple[int, ...] = ()) -> set[tuple[int, int]]:
        """(address in the pool, address in staging) of every byte that chunks own."""
        found = set()
        for chunk, slot in enumerate(self.run.slot_ids.tolist()):
            if chunk in skip:
                continue
            there, here = self.pool.slots[slot].data_ptr(), self.staging[chunk].data_ptr()
            for run in self.run.group.byte_ranges:
                for byte in range(run.num_bytes):
                    found.add((there + run.slot_offset + byte, here + run.packed_offset + byte))
        return found


def every_byte(parts) -> list[tuple[int, int]]:
    """(address, address) of each byte of ranges given as (address, address, size)."""
    return [(int(a) + i, int(b) + i) for a, b, n in parts for i in range(int(n))]


def rows_of(pairs) -> list[tuple[int, int, int]]:
    """(address, address, size) of every row of pairs of tensors."""
    found = []
    for a, b in pairs:
        assert a.shape == b.shape
        for x, y in zip(a.view(-1, a.shape[-1]) if a.dim() == 1 else a, b, strict=True):
            found.append((x.data_ptr(), y.data_ptr(), x.shape[0]))
    return found


# -- slices --


def check_slices(num_rows: int, width: int, most: int) -> None:
    a = torch.zeros((num_rows, width), dtype=torch.uint8)
    b = torch.zeros((num_rows, width + 1), dtype=torch.uint8)[:, :width]
    count = 0
    for x, y in ranges._slices(a, 0, b, 0, num_rows):
        assert 0 < x.numel() <= most
        offset = x.data_ptr() - a.data_ptr()
        row, column = divmod(offset, width)
        assert y.data_ptr() - b.data_ptr() == row * (width + 1) + column
        assert x.shape == y.shape
        x += 1
        y += 1
        count += 1
    assert (a == 1).all(), "a byte is left, or moved twice"
    assert (b == 1).all()
    rows = max(1, most // width)
    assert count == -(-num_rows // rows) * max(1, -(-width // most)), "more copies than it takes"


def test_slices_cover_every_byte_once_whatever_the_edges(monkeypatch):
    monkeypatch.setattr(ranges, "SLICE_BYTES", 8)
    for num_rows, width in itertools.product(range(1, 12), range(1, 26)):
        check_slices(num_rows, width, 8)


@pytest.mark.parametrize(
    ("num_rows", "width"),
    [
        (1, 8 * MIB - 1),
        (1, 8 * MIB),
        (2, 8 * MIB + 1),
        (8, MIB),
        (9, MIB),
        (9, MIB - 1),
        (8, MIB + 1),
        (2, 4 * MIB + 1),
    ],
)
def test_slices_are_of_eight_mebibytes(num_rows, width):
    assert ranges.SLICE_BYTES == 8 * MIB
    check_slices(num_rows, width, 8 * MIB)


# -- ranges of adjacent slots --


def listed(found: ChunkRanges) -> list[tuple[int, int]]:
    return list(zip(found.firsts.tolist(), found.counts.tolist(), strict=True))


@pytest.mark.parametrize(
    ("slots", "skip", "piece_slots", "wanted"),
    [
        ([7], (), 40, [(0, 1)]),
        ([7], (0,), 40, []),
        ([7, 8, 9], (), 40, [(0, 3)]),
        ([9, 8, 7], (), 40, [(0, 1), (1, 1), (2, 1)]),
        ([7, 8, 10, 11], (), 40, [(0, 2), (2, 2)]),
        ([7, 8, 9, 10], (0,), 40, [(1, 3)]),
        ([7, 8, 9, 10], (3,), 40, [(0, 3)]),
        ([7, 8, 9, 10], (0, 3), 40, [(1, 2)]),
        ([7, 8, 9, 10], (1,), 40, [(0, 1), (2, 2)]),
        ([7, 8, 9, 10], (0, 1, 2, 3), 40, []),
        ([2, 3, 4, 5, 6, 7, 8], (), 4, [(0, 2), (2, 4), (6, 1)]),
        ([3, 4], (), 4, [(0, 1), (1, 1)]),
        ([9, 2, 3, 4, 5], (), 4, [(0, 1), (1, 2), (3, 2)]),
        ([4, 5, 6, 7], (), 4, [(0, 4)]),
    ],
)
def test_ranges_are_of_adjacent_slots_within_a_piece(slots, skip, piece_slots, wanted):
    setting = Setting(list(range(len(slots))), slots, piece_slots=piece_slots)
    assert listed(ChunkRanges.of(setting.run, setting.pool, skip)) == wanted


@pytest.mark.parametrize("group", [None, ((0, 5),), ((1, 2),), ((0, 5), (2, 2))])
@pytest.mark.parametrize("skip", [(), (0,), (6,), (2, 3)])
def test_whole_chunks_are_every_byte_of_the_group_once(monkeypatch, group, skip):
    monkeypatch.setattr(ranges, "SLICE_BYTES", 12)
    setting = Setting(list(range(7)), [3, 4, 5, 9, 8, 20, 21], group=group, row_gap=3)
    found = ChunkRanges.of(setting.run, setting.pool, skip)
    pairs = list(whole_chunks(setting.run, setting.pool, setting.staging, found))
    assert all(there.numel() <= 12 for there, _ in pairs)
    moved = every_byte(rows_of(pairs))
    assert len(moved) == len(set(moved))
    assert set(moved) == setting.bytes_of_chunks(skip)


# -- batches --


@pytest.mark.parametrize("group", [None, ((1, 3),), ((0, 5), (2, 2))])
@pytest.mark.parametrize("skip", [(), (0,), (1,)])
@pytest.mark.parametrize("num_chunks", range(1, 14))
def test_batches_are_every_byte_once_and_a_slice_at_most(monkeypatch, num_chunks, skip, group):
    """One chunk more than a batch, or than several: it has a batch of its own."""
    if max(skip, default=0) >= num_chunks:
        return
    blocks = list(range(num_chunks))
    setting = Setting(blocks, [3 * block + 1 for block in blocks], group=group, row_gap=3)
    chunk_bytes = setting.run.group.packed.slot_bytes
    for most in (4 * chunk_bytes, 5 * chunk_bytes - 1):
        monkeypatch.setattr(ranges, "SLICE_BYTES", most)
        batches = list(chunk_batches(setting.run, setting.pool, setting.staging, skip))
        assert [len(sizes) % len(setting.run.group.byte_ranges) for *_, sizes in batches] == [
            0
        ] * len(batches)
        assert len(batches) == -(-(num_chunks - len(skip)) // 4)
        assert all(sizes.sum() <= most for *_, sizes in batches)
        moved = [
            pair
            for there, here, sizes in batches
            for pair in every_byte(zip(there, here, sizes, strict=True))
        ]
        assert len(moved) == len(set(moved))
        assert set(moved) == setting.bytes_of_chunks(skip)


def test_a_chunk_of_a_whole_slice_is_a_batch(monkeypatch):
    setting = Setting([0, 1], [5, 9])
    monkeypatch.setattr(ranges, "SLICE_BYTES", setting.layout.slot_bytes)
    batches = list(chunk_batches(setting.run, setting.pool, setting.staging))
    assert [int(sizes.sum()) for *_, sizes in batches] == [setting.layout.slot_bytes] * 2


# -- pages in slots --


def bytes_of_pages(setting: Setting, run: GroupRun) -> set[tuple[int, int]]:
    """(address in the cache, address in the pool) of every byte of the run's pages."""
    found = set()
    columns = run.group.columns.T.tolist()
    span = run.group.table.blocks_per_chunk
    for i, block in enumerate(run.block_ids.tolist()):
        chunk, position = divmod(run.first + i, span)
        slot = setting.pool.slots[int(run.slot_ids[chunk])].data_ptr()
        for address, stride, size, offset, pitch in columns:
            for byte in range(size):
                page = address + block * stride + byte
                found.add((page, slot + offset + position * pitch + byte))
    return found


@pytest.mark.parametrize("span", [1, 2, 3])
@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize(
    "blocks",
    [[4], [4, 5], [5, 4], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6], [1, 2, 7, 8, 9], [6, 3, 4, 5, 0]],
)
def test_addresses_are_every_byte_of_the_pages_once(blocks, first, span):
    first %= span
    slots = [7, 3, 4, 5, 30, 31, 2][: -(-(first + len(blocks)) // span)]
    pages = ((5, 5), (3, 4), (6, 6))
    for group in (None, ((0, 5), (2, 4)), ((1, 3),)):
        setting = Setting(blocks, slots, pages=pages, group=group, span=span, first=first)
        parts = list(zip(*addresses(setting.run, setting.pool), strict=True))
        moved = every_byte(parts)
        assert len(moved) == len(set(moved))
        assert set(moved) == bytes_of_pages(setting, setting.run)


def test_addresses_join_what_is_contiguous_on_both_sides():
    setting = Setting([4, 5, 6, 8, 9, 3], [7, 3, 4], pages=((5, 5),), span=2)
    _, _, sizes = addresses(setting.run, setting.pool)
    assert sizes.tolist() == [10, 5, 5, 5, 5]


@pytest.mark.parametrize(("stride", "pitch"), [(5, 5), (5, 8), (7, 5), (7, 8)])
def test_addresses_join_no_pages_that_lie_apart_on_either_side(stride, pitch):
    """Tables as they are have no slot whose pages lie further apart than the cache's; what the
    columns say holds all the same."""
    setting = Setting([0, 1, 2, 3], [7, 3], pages=((8, 8),), span=2)
    (address, _, _, offset, _) = setting.run.group.columns[:, 0].tolist()
    columns = np.array([[address], [stride], [5], [offset], [pitch]])
    run = setting.run._replace(group=replace(setting.run.group, columns=columns))
    pages, slots, sizes = addresses(run, setting.pool)
    assert sizes.tolist() == ([10, 10] if (stride, pitch) == (5, 5) else [5] * 4)
    moved = set(every_byte(zip(pages, slots, sizes, strict=True)))
    assert moved == bytes_of_pages(setting, run)


def test_positions_are_the_pages_of_one_slot():
    setting = Setting([0, 1, 2], [7], pages=((8, 8), (4, 4)), group=((1, 3),), span=3, row_gap=5)
    slot = setting.pool.slots[7]
    slot.copy_(torch.arange(len(slot)))
    (page,) = setting.run.group.table.pages
    assert positions(slot, page, 1, 3).tolist() == [[28, 29, 30], [32, 33, 34]]
    assert positions(slot, page, 0, 1).tolist() == [[24, 25, 26]]


@pytest.mark.parametrize("size", range(1, 18))
def test_zeros_cover_a_slot_of_any_size(size):
    slot, zeros = torch.full((size + 1,), 7, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)
    for part, source in zeros_over(slot[:size], zeros):
        assert part.shape == source.shape
        part.copy_(source)
    assert slot.tolist() == [0] * size + [7]
