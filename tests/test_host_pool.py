"""The host pool: its size, its pieces, shared memory, and what it refuses."""

from __future__ import annotations

import mmap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import triton_offload.pool.host_pool as host_pool_module
from triton_offload.device.host import HostDevice
from triton_offload.pool.host_pool import HostPool


class RecordingDevice(HostDevice):
    """Counts what is pinned; `refuse_after` pieces it says no."""

    def __init__(self, refuse_after: int = 1 << 30) -> None:
        super().__init__()
        self.registered: list[tuple[int, int]] = []
        self.unregistered: list[int] = []
        self.refuse_after = refuse_after

    def register(self, host: torch.Tensor) -> bool:
        if len(self.registered) >= self.refuse_after:
            return False
        self.registered.append((host.data_ptr(), host.numel()))
        return True

    def unregister(self, host: torch.Tensor) -> None:
        self.unregistered.append(host.data_ptr())


def test_a_pool_is_exactly_as_large_as_asked_and_reads_as_zeros():
    pool = HostPool.allocate(HostDevice(), 1000, 4100)
    pool.wait_ready(60)
    assert pool.slots.shape == (1000, 4100)
    assert pool.slots.untyped_storage().nbytes() == 4100 * 1000
    assert pool.pinned
    assert not pool.slots.any()
    pool.close()


def test_it_is_pinned_in_pieces_of_whole_slots_and_whole_os_pages(monkeypatch):
    monkeypatch.setattr(host_pool_module, "_MAX_PIECE_BYTES", 10 * mmap.PAGESIZE)
    device = RecordingDevice()
    slot = mmap.PAGESIZE // 2
    pool = HostPool.allocate(device, 51, slot)
    pool.wait_ready(60)
    assert pool.piece_slots == 20
    start = pool.slots.data_ptr()
    assert device.registered == [
        (start, 20 * slot),
        (start + 20 * slot, 20 * slot),
        (start + 40 * slot, 11 * slot),
    ]
    assert pool.pinned
    pool.close()
    pool.close()
    assert sorted(device.unregistered) == [address for address, _ in device.registered]


def test_a_pool_that_cannot_be_pinned_works_and_says_so(monkeypatch):
    monkeypatch.setattr(host_pool_module, "_MAX_PIECE_BYTES", mmap.PAGESIZE)
    device = RecordingDevice(refuse_after=2)
    pool = HostPool.allocate(device, 5, mmap.PAGESIZE)
    pool.wait_ready(60)
    assert not pool.pinned
    pool.slots.fill_(3)
    pool.close()
    assert len(device.unregistered) == 2


def test_it_is_usable_while_it_is_being_pinned():
    gate = threading.Event()

    class SlowDevice(HostDevice):
        def register(self, host: torch.Tensor) -> bool:
            return gate.wait(60)

    pool = HostPool.allocate(SlowDevice(), 4, 64)
    assert not pool.pinned
    with pytest.raises(TimeoutError, match="not ready within"):
        pool.wait_ready(0.01)
    pool.slots.fill_(9)
    gate.set()
    pool.wait_ready(60)
    assert pool.pinned
    assert bool((pool.slots == 9).all())  # touching and pinning wrote nothing
    pool.close()


def test_a_shared_pool_is_one_memory_for_all_its_ranks_and_has_no_name(tmp_path):
    path = str(tmp_path / "pool")
    with ThreadPoolExecutor() as threads:
        size = HostDevice(), 8, 64, path, 3
        attached = [threads.submit(HostPool.attach, *size) for _ in range(2)]
        pool = HostPool.share(*size)
        others = [future.result(60) for future in attached]
    assert list(tmp_path.iterdir()) == []
    assert not pool.slots.any()
    pool.slots[5] = 1
    others[1].slots[3] = 7
    assert bool((others[0].slots[5] == 1).all())
    assert bool((pool.slots[3] == 7).all())
    for each in (pool, *others):
        assert each.slots.untyped_storage().nbytes() == 8 * 64
        each.close()


@pytest.mark.parametrize("make", [HostPool.share, HostPool.attach])
def test_a_shared_pool_of_no_ranks_or_no_slots_is_refused(make, tmp_path):
    path = str(tmp_path / "pool")
    with pytest.raises(ValueError, match="num_ranks: expected an integer of at least 1, got 0"):
        make(HostDevice(), 8, 64, path, 0)
    with pytest.raises(ValueError, match="num_slots"):
        make(HostDevice(), 0, 64, path, 1)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (torch.zeros(4, 4), r"slots: expected uint8 .*got torch.float32 \(4, 4\)"),
        (torch.zeros(4, dtype=torch.uint8), "slots: expected uint8"),
        (torch.zeros(4, 4, dtype=torch.uint8).t(), "slots: expected contiguous rows"),
        (
            torch.zeros(0, 4, dtype=torch.uint8),
            "num_slots: expected an integer of at least 1, got 0",
        ),
    ],
)
def test_memory_that_cannot_be_slots_is_refused(slots, message):
    with pytest.raises(ValueError, match=message):
        HostPool.from_tensor(HostDevice(), slots, pinned=False)


@pytest.mark.parametrize(("num_slots", "slot_bytes"), [(0, 64), (4, 0)])
def test_empty_pools_are_refused(num_slots, slot_bytes):
    with pytest.raises(ValueError, match="expected an integer of at least 1, got 0"):
        HostPool.allocate(HostDevice(), num_slots, slot_bytes)
