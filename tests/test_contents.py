"""What a store must clear of its slots, by what they held."""

from __future__ import annotations

import itertools

import pytest
import torch

from triton_offload.slabs import Slabs
from triton_offload.specs import CPULoadStoreSpec, Direction, GPULoadStoreSpec
from triton_offload.transfer.contents import SlotContents, SlotMarks
from triton_offload.transfer.layout import CacheLayout, place

# Group 0 covers the others; 1 and 2 have a tensor each; 3 is padded, with less of 1's tensor.
GROUPS = [[(0, 8), (1, 4)], [(0, 8)], [(1, 4)], [(0, 5)]]
PADDED = 3


class Slots:
    """Slots of two blocks each; all stores are of the same few slots."""

    def __init__(self, **options) -> None:
        tensors = [torch.zeros((16, 8), dtype=torch.uint8), torch.zeros((16, 4), dtype=torch.uint8)]
        self.layout = CacheLayout(tensors, 2, GROUPS)
        self.contents = SlotContents(self.layout, Slabs.of(24, 8, [24]), **options)

    def store(self, group: int, slots=(2, 3, 4), *, first=0, count=None, fresh=True) -> SlotMarks:
        marks = self.contents.store(self.run(group, slots, first, count, fresh))
        self.contents._check()
        return marks

    def run(self, group: int, slots, first=0, count=None, fresh=True):
        count = 2 * len(slots) - first if count is None else count
        sizes = [count if g == group else 0 for g in range(len(GROUPS))]
        pages = GPULoadStoreSpec(range(count), sizes, [first] * len(GROUPS))
        spec = CPULoadStoreSpec(list(slots), fresh)
        (run,) = self.layout.plan(Direction.STORE, pages, spec, 8)
        return run


@pytest.mark.parametrize(("before", "now"), [*itertools.product(range(4), repeat=2)])
def test_a_fresh_slot_is_cleared_where_a_chunk_leaves_something_of_the_one_before(before, now):
    covers = now == 0 or before == now or (before == PADDED and now == 1)
    slots = Slots()
    assert slots.store(before).stale == ()  # a pool begins with zeros
    assert slots.store(now).stale == (() if covers else (0, 1, 2))
    assert slots.store(now).stale == ()


def test_bytes_of_several_groups_are_cleared_by_every_fresh_store():
    slots = Slots()
    slots.store(1)
    assert slots.store(2, fresh=False).stale == ()  # keeps group 1's
    assert slots.store(2).stale == (0, 1, 2)
    assert slots.store(2).stale == ()


def test_a_store_that_keeps_bytes_of_its_own_group_leaves_the_slot_to_that():
    slots = Slots()
    assert slots.store(1, fresh=False).stale == ()
    assert slots.store(1, fresh=False).stale == ()
    assert slots.store(1).stale == ()


def test_only_the_slots_of_a_failed_store_are_in_doubt():
    slots = Slots()
    slots.store(1, (0, 1, 2, 3, 4))
    slots.contents.doubt([slots.run(1, (1, 3)), slots.run(1, (4,))])
    slots.contents._check()
    assert slots.store(1, (0, 1, 2, 3, 4)).stale == (1, 3, 4)
    assert slots.store(1, (0, 1, 2, 3, 4)).stale == ()


@pytest.mark.parametrize("group", range(4))
def test_what_others_wrote_is_cleared_but_where_a_chunk_is_all_of_its_slot(group):
    slots = Slots(other_writers=True)
    for _ in range(2):  # after a store they may write again
        assert slots.store(group).stale == (() if group == 0 else (0, 1, 2))
    assert slots.store(group, first=1, count=4).unfilled == (0, 2)
    assert slots.store(group).stale == (() if group == 0 else (0, 1, 2))


def test_a_chunk_of_padded_pages_is_never_all_of_its_slot():
    tensors = [torch.zeros((16, 8), dtype=torch.uint8)]
    padded, whole = ([[(0, size)]] for size in (5, 8))
    for groups, stale in ((padded, (0,)), (whole, ())):
        layout = CacheLayout(tensors, 1, groups)
        pages, slot = GPULoadStoreSpec([3], [1], [0]), CPULoadStoreSpec([2], True)
        (run,) = layout.plan(Direction.STORE, pages, slot, 8)
        contents = SlotContents(layout, Slabs.of(8, 8, [8]), other_writers=True)
        assert contents.store(run).stale == stale


def test_what_a_whole_chunk_covers_is_not_cleared_whatever_it_was():
    slots = Slots()
    slots.contents.doubt([slots.run(0, (2, 3, 4))])
    assert slots.store(0).stale == ()


@pytest.mark.parametrize(
    ("first", "count", "partial"),
    [(0, 6, ()), (1, 5, (0,)), (0, 5, (2,)), (1, 4, (0, 2))],
)
@pytest.mark.parametrize("group", [0, PADDED])
def test_partial_chunks_are_filled_where_fresh_and_kept_where_not(group, first, count, partial):
    marks = Slots().store(group, first=first, count=count)
    assert (marks.unfilled, marks.kept) == (partial, ())
    marks = Slots().store(group, first=first, count=count, fresh=False)
    # between padded pages lie bytes that a copy of the whole chunk would overwrite
    assert (marks.unfilled, marks.kept) == ((), (0, 1, 2) if group == PADDED else partial)


def test_each_slot_has_a_flag_of_its_own():
    slots = Slots()
    slots.store(0)
    marks = slots.store(1, first=1, count=4, fresh=[True, True, False])
    assert (marks.stale, marks.unfilled, marks.kept) == ((0, 1), (0,), (2,))
    assert slots.store(1).stale == (2,)
    assert slots.store(2, fresh=[True, False, True]).stale == (0, 2)
    assert slots.store(2).stale == (1,)  # which keeps bytes of group 1


def test_in_a_slab_that_held_others_bytes_the_gaps_are_cleared():
    """Slots of 20 bytes with gaps, and of 16 without, one of each to a slab."""
    tensors = [torch.zeros((16, 8), dtype=torch.uint8), torch.zeros((16, 2), dtype=torch.uint8)]
    layout = CacheLayout(tensors, 2, [[(0, 5), (1, 2)], [(0, 8)]], packed=True)
    slabs = Slabs.of(24, 4, layout.slot_sizes)
    contents = SlotContents(layout, slabs)

    def store(group: int, slots: list[int]) -> tuple[int, ...]:
        sizes = [2 * len(slots) if g == group else 0 for g in range(2)]
        spec = CPULoadStoreSpec(slots, fresh=True)
        pages = GPULoadStoreSpec(range(2 * len(slots)), sizes)
        (run,) = place(layout.plan(Direction.STORE, pages, spec, slabs.num_slots), slabs)
        marks = contents.store(run)
        contents._check()
        return marks.stale

    assert store(1, [6]) == ()  # in slab 2
    assert store(0, [0, 2]) == (1,)
    assert store(0, [0, 2]) == ()
    assert store(1, [4, 6]) == ()  # which covers all that the others left
    assert store(0, [0, 1, 2]) == (0, 2)
