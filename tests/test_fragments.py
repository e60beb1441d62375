"""Pages that lie in slots in fragments, so that several fill one slot together."""

from __future__ import annotations

import pytest
import torch

from triton_offload.calibration import Path
from triton_offload.device.host import HostDevice
from triton_offload.kernels.fragments import Fragment, fragment_table
from triton_offload.kernels.table import ByteRange, PageTable
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import CPULoadStoreSpec, GPULoadStoreSpec, TransferStatus
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.options import PipelineOptions
from triton_offload.transfer.queue_manager import transfer_queue

BLOCKS, SPAN, SLOTS = 8, 3, 6
ROOM = (24, 10)  # of a block in a slot: of each tensor, that of both ranks
# (where it begins, bytes, place) of a page of each tensor, for each of two ranks, which have
# half of the first one's bytes each, in two parts, and five bytes of the other
PARTS = [
    [[(0, 8, 0), (8, 4, 16)], [(0, 5, 0)]],
    [[(0, 8, 8), (8, 4, 20)], [(0, 5, 5)]],
]


def _table(span: int = SPAN) -> PageTable:
    return PageTable([torch.zeros(BLOCKS, n, dtype=torch.uint8) for n in (12, 5)], span)


class Rank:
    """One of those that fill the pool's slots. Group 0 has the first tensor, group 1 both."""

    def __init__(self, number: int, memory: torch.Tensor, path: Path) -> None:
        self._number = number
        generator = torch.Generator().manual_seed(number)
        self.tensors = [
            torch.randint(1, 256, (BLOCKS, n), dtype=torch.uint8, generator=generator)
            for n in (12, 5)
        ]
        parts = [[Fragment(t, *cut) for cut in PARTS[number][t]] for t in range(2)]
        self.layout = CacheLayout.in_fragments(
            self.tensors, SPAN, ROOM, [parts[0], parts[0] + parts[1]]
        )
        self.pool = HostPool.from_tensor(HostDevice(), memory, pinned=True)
        self.pool.has_other_writers = True
        options = PipelineOptions(path=path, buffer_bytes=1)
        self._queue = transfer_queue(self.layout, self.pool, "auto", options)

    def move(
        self, store: bool, group: int, blocks: list[int], first: int, slots: list[int]
    ) -> None:
        sizes = [len(blocks) if g == group else 0 for g in range(2)]
        pages = GPULoadStoreSpec(blocks, sizes, [first, first])
        ends = pages, CPULoadStoreSpec(slots, True if store else None)
        job = self._queue.transfer_async(*(ends if store else reversed(ends)))
        self._queue.wait([job])
        (result,) = self._queue.get_finished()
        assert result.status is TransferStatus.SUCCESS, result.error
        assert result.num_bytes == len(blocks) * (12, 17)[group]

    def expect(
        self, rows: torch.Tensor, group: int, blocks: list[int], first: int, slots: list[int]
    ) -> None:
        """What a store makes of the slots: what is this rank's of them is cleared, and filled."""
        for tensor in range(2):
            for begin, size, place in PARTS[self._number][tensor]:
                for s in range(SPAN):
                    start = SPAN * sum(ROOM[:tensor]) + s * ROOM[tensor] + place
                    rows[slots, start : start + size] = 0
                    if tensor > group:
                        continue
                    for i, block in enumerate(blocks, start=first):
                        if i % SPAN == s:
                            cut = self.tensors[tensor][block, begin : begin + size]
                            rows[slots[i // SPAN], start : start + size] = cut

    def close(self) -> None:
        self._queue.shutdown()
        self.pool.close()


# (group, blocks, where the first lies in its chunk, slots): whole and partial chunks
STORES = [
    (1, [7, 2, 4, 0, 1, 6], 0, [5, 2]),
    (0, [3, 5, 1], 0, [2]),
    (1, [6, 0], 2, [4, 1]),
    (0, [1], 1, [5]),
]


@pytest.mark.parametrize("path", list(Path))
def test_each_writes_its_own_bytes_of_a_slot_and_no_other(path: Path) -> None:
    memory = torch.zeros((SLOTS, SPAN * sum(ROOM) + 6), dtype=torch.uint8)
    ranks = [Rank(number, memory[:, : SPAN * sum(ROOM)], path) for number in range(2)]
    for group, blocks, first, slots in STORES:
        memory.fill_(0x5A)
        expected = memory.clone()
        for rank in ranks:
            rank.expect(expected, group, blocks, first, slots)
            rank.move(True, group, blocks, first, slots)
            assert torch.equal(memory, expected)
        assert not (memory[slots, : SPAN * sum(ROOM)] == 0x5A).all(1).any()
        targets = [block ^ 1 for block in blocks]
        for rank in ranks:
            before = [tensor.clone() for tensor in rank.tensors]
            for tensor in rank.tensors:
                tensor.fill_(0x41)
            rank.move(False, group, targets, first, slots)
            for t, (tensor, old) in enumerate(zip(rank.tensors, before, strict=True)):
                loaded = targets if t <= group else []
                wanted = torch.full_like(tensor, 0x41)
                wanted[loaded] = old[blocks[: len(loaded)]]
                assert torch.equal(tensor, wanted)
                tensor.copy_(old)
        assert torch.equal(memory, expected), "a load wrote to a slot"
    for rank in ranks:
        rank.close()


def test_what_is_packed_is_what_is_ones_own() -> None:
    table = fragment_table(_table(), ROOM, [Fragment(0, *cut) for cut in PARTS[1][0]])
    assert table.slot_bytes == SPAN * sum(ROOM)
    assert table.bytes_per_block == 12
    # 8 to 16 and 20 to 24 of each 24 bytes: what ends a place does not touch the next
    assert [(part.slot_offset, part.num_bytes) for part in table.byte_ranges] == [
        *((8, 8), (20, 4)),
        *((32, 8), (44, 4)),
        *((56, 8), (68, 4)),
    ]
    packed = table.packed()
    assert packed.slot_bytes == SPAN * 12
    assert [(row.offset, row.pitch) for row in packed.pages] == [(0, 12), (8, 12)]


def test_fragments_that_lie_side_by_side_are_one_range() -> None:
    parts = [Fragment(0, 0, 8, 4), Fragment(0, 8, 4, 0), Fragment(1, 0, 5, 0)]
    table = fragment_table(_table(), (12, 5), parts)
    assert table.byte_ranges == (ByteRange(0, 0, SPAN * 17),)
    assert [(row.offset, row.pitch) for row in table.packed().pages] == [(4, 12), (0, 12), (36, 5)]


def test_only_ones_own_is_cleared_and_a_chunk_that_is_all_of_that_clears_nothing() -> None:
    layout = CacheLayout.in_fragments(
        [torch.zeros(BLOCKS, 12, dtype=torch.uint8)], 1, [24], [[Fragment(0, 0, 12, 12)]]
    )
    assert layout.own_ranges == ((12, 12),)
    assert not layout.groups[0].has_gaps
    assert CacheLayout([torch.zeros(BLOCKS, 12)]).own_ranges is None


@pytest.mark.parametrize(
    "part",
    [
        Fragment(0, -1, 4, 0),
        Fragment(0, 9, 4, 0),
        Fragment(0, 0, 0, 0),
        Fragment(0, 0, 4, -1),
        Fragment(0, 0, 4, 21),
        Fragment(1, 0, 5, 6),
    ],
)
def test_a_part_that_is_outside_of_its_page_or_place_is_refused(part: Fragment) -> None:
    with pytest.raises(ValueError, match=r"^groups\[1\]: expected parts of pages of .* places of "):
        CacheLayout.in_fragments(
            [torch.zeros(BLOCKS, n, dtype=torch.uint8) for n in (12, 5)],
            SPAN,
            ROOM,
            [[Fragment(0, 0, 12, 12)], [part]],
        )


def test_places_of_each_tensor_and_parts_of_some_are_wanted() -> None:
    with pytest.raises(ValueError, match="place_bytes: expected one size for each of 2 tensors"):
        fragment_table(_table(), [24], [Fragment(0, 0, 4, 0)])
    with pytest.raises(ValueError, match="fragments: expected at least one part of a page"):
        fragment_table(_table(), ROOM, [])
