"""Staging buffers in turn, and memory for ids that comes back in the order in which it went."""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from triton_offload.device.host import HostDevice
from triton_offload.kernels.table import PageTable
from triton_offload.transfer import staging
from triton_offload.transfer.staging import IndexRing, StagingRing


def tables() -> tuple[PageTable, PageTable]:
    return (
        PageTable([torch.zeros((4, 5), dtype=torch.uint8)], 2),
        PageTable([torch.zeros((4, 3), dtype=torch.uint8)], 2),
    )


# -- buffers --


def test_buffers_are_taken_in_turn():
    ring = StagingRing(HostDevice(), 3, 64)
    taken = [ring.take() for _ in range(7)]
    assert [taken.index(buffer) for buffer in taken] == [0, 1, 2, 0, 1, 2, 0]
    assert ring.num_taken == 7
    ring._check()


def test_a_buffer_is_as_many_slots_of_a_table_as_fit():
    wide, narrow = tables()  # slots of 10 and of 6 bytes
    buffer = StagingRing(HostDevice(), 1, 64).take()
    buffer.memory.fill_(1)
    for table, count in ((wide, 6), (narrow, 10), (wide, 6)):
        slots = buffer.slots(table)
        assert slots.shape == (count, table.slot_bytes)
        assert slots.data_ptr() == buffer.memory.data_ptr()
        assert buffer.slots(table) is slots
    buffer.slots(wide).fill_(2)
    assert buffer.memory.tolist() == [2] * 60 + [1] * 4


def test_a_distrusted_ring_takes_no_buffer_for_cleared():
    ring = StagingRing(HostDevice(), 2, 64)
    for buffer in (ring.take(), ring.take()):
        buffer.holds = tables()[0]
    ring.distrust()
    assert [ring.take().holds, ring.take().holds] == [None, None]


def test_a_closed_ring_keeps_no_memory():
    ring = StagingRing(HostDevice(), 2, 64)
    memory = [StorageWeakRef(ring.take().memory.untyped_storage()) for _ in range(2)]
    ring.take().slots(tables()[0])
    ring.close()
    ring.close()
    assert all(each.expired() for each in memory)


# -- ids --


def test_ids_lie_side_by_side_until_they_are_freed():
    ring = IndexRing(HostDevice(), 8)
    first = ring.take(np.array([1, 2]), np.array([3]))
    second = ring.take(np.array([4, 5, 6]), np.array([7]))
    assert ring.take(np.array([8, 9])) is None
    assert [part.tolist() for part in (*first, *second)] == [[1, 2], [3], [4, 5, 6], [7]]
    ring.free()
    assert not ring.has_room(3), "the head would meet the tail"
    assert ring.has_room(2)
    third = ring.take(np.array([8]), np.array([9]))
    assert [part.tolist() for part in (*second, *third)] == [[4, 5, 6], [7], [8], [9]]
    ring._check()
    ring.free()
    ring.free()
    assert ring.has_room(8)


def test_more_ids_than_there_is_room_for_are_refused():
    ring = IndexRing(HostDevice(), 8)
    for call in (ring.has_room, lambda n: ring.take(np.arange(n))):
        with pytest.raises(ValueError, match="ids: expected at most 8 in a segment, got 9"):
            call(9)


@pytest.mark.parametrize("seed", range(20))
def test_ids_that_are_taken_are_never_overwritten(seed):
    rng = random.Random(seed)
    capacity = rng.randrange(4, 20)
    ring = IndexRing(HostDevice(), capacity)
    taken: deque[tuple[list[torch.Tensor], list[list[int]]]] = deque()
    number = waited = 0
    for _ in range(400):
        count = rng.randrange(capacity // 2 + 1)
        cut = rng.randrange(count + 1)
        ids = np.arange(number, number + count)
        room = ring.has_room(count)
        parts = ring.take(ids[:cut], ids[cut:])
        assert room == (parts is not None)
        if parts is None:
            assert taken, "an empty ring has room"
            waited += 1
        else:
            taken.append((parts, [ids[:cut].tolist(), ids[cut:].tolist()]))
            number += count
        while taken and (parts is None or rng.random() < 0.5):
            ring.free()
            taken.popleft()
            parts = []
        for tensors, wanted in taken:
            assert [tensor.tolist() for tensor in tensors] == wanted
        ring._check()
    assert waited


def test_a_closed_ring_of_ids_keeps_no_memory():
    ring = IndexRing(HostDevice(), 8)
    memory = StorageWeakRef(ring._memory.untyped_storage())
    ring.take(np.array([1]))
    ring.close()
    ring.close()
    assert memory.expired()
    assert ring.capacity == 0
    ring._check()


def test_ids_are_those_that_were_put_there_though_views_are_kept(monkeypatch):
    monkeypatch.setattr(staging, "_MAX_VIEWS", 4)
    ring = IndexRing(HostDevice(), 64)
    for count in (1, 2, 3, 2, 1, 3):
        first, second = np.arange(count), 50 - np.arange(2 * count)
        ids = ring.take(first, second)
        assert ids is not None
        assert [each.tolist() for each in ids] == [first.tolist(), second.tolist()]
        more = ring.take(second)
        assert more is not None
        assert more[0].tolist() == second.tolist()
        assert ids[0].tolist() == first.tolist(), "what is taken was written over"
        ring.free()
        ring.free()
        assert len(ring._views) <= 4
        ring._check()
