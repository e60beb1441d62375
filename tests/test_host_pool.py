"""The host pool: its size, its pieces, shared memory, and what it refuses."""

from __future__ import annotations

import gc
import itertools
import mmap
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

import triton_offload.pool.host_pool as host_pool_module
import triton_offload.pool.preparation as preparation_module
from triton_offload.device.host import HostDevice
from triton_offload.pool.host_pool import HostPool
from triton_offload.pool.memory_limits import check_memory


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def small_machine(folder):
    """A /proc of a machine on which a GiB is free."""
    (folder / "meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable: 1048576 kB\n")
    return folder


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


@pytest.mark.parametrize("bad", [0, -1, 2.0, "3", None, True])
def test_sizes_are_integers_of_at_least_one(bad):
    for name, sizes in (("num_slots", (bad, 64)), ("slot_bytes", (4, bad))):
        with pytest.raises(ValueError, match=f"{name}: expected an integer of at least 1, got"):
            HostPool.allocate(HostDevice(), *sizes)


def test_sizes_may_be_numpy_s_and_their_product_does_not_overflow():
    pool = HostPool.allocate(HostDevice(), np.int64(3), np.int32(64))
    assert pool.slots.shape == (3, 64)
    pool.close()
    with pytest.raises(ValueError, match="host_bytes: expected at most"):
        HostPool.allocate(HostDevice(), np.int32(2**31 - 1), np.int32(2**31 - 1))


# -- memory that is not there --


@pytest.mark.parametrize(
    ("num_slots", "got"), [(10**18, r"931322574\.6 TiB"), (500 << 20, "500.0 GiB")]
)
def test_a_pool_that_does_not_fit_is_refused_before_anything_is_mapped(
    num_slots, got, monkeypatch, tmp_path
):
    monkeypatch.setattr(
        host_pool_module, "check_memory", partial(check_memory, proc=small_machine(tmp_path))
    )
    monkeypatch.delattr(mmap, "mmap")
    with pytest.raises(ValueError, match=f"host_bytes: expected at most .*, got {got}"):
        HostPool.allocate(HostDevice(), num_slots, 1024)


def test_a_shared_pool_that_does_not_fit_is_refused_before_there_is_a_file(tmp_path, monkeypatch):
    made = HostDevice(), 500 << 20, 1024, str(tmp_path / "pool"), 2
    with pytest.raises(ValueError, match=r"host_bytes: .*memory that is free.*500\.0 GiB"):
        HostPool.share(*made)
    monkeypatch.setattr(host_pool_module, "check_memory", lambda *_: None)
    with pytest.raises(ValueError, match=rf"host_bytes: .* is free in {tmp_path}.*500\.0 GiB"):
        HostPool.share(*made)
    assert list(tmp_path.iterdir()) == []


# -- its end --


def mapped(address: int) -> bool:
    with open("/proc/self/maps") as lines:
        ranges = (line.split()[0].split("-") for line in lines)
        return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)


def threads_of_ours() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("triton-offload")]


@pytest.mark.parametrize("shared", [False, True])
def test_a_closed_pool_is_unmapped_and_says_that_it_is_closed(shared, tmp_path):
    if shared:
        pool = HostPool.share(HostDevice(), 1 << 16, 1 << 10, str(tmp_path / "pool"), 1)
    else:
        pool = HostPool.allocate(HostDevice(), 1 << 16, 1 << 10)
    start = pool.slots.data_ptr()
    pool.wait_ready(60)
    assert mapped(start)
    kept = pool.slots[:1]
    pool.close()
    assert mapped(start)  # somebody's tensor
    del kept
    assert not mapped(start)
    assert not threads_of_ours()
    assert not pool.pinned
    with pytest.raises(RuntimeError, match="the host pool is closed"):
        pool.slots.data_ptr()
    assert (pool.num_slots, pool.slot_bytes) == (1 << 16, 1 << 10)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("ready", [False, True])
def test_a_pool_that_is_dropped_is_freed_with_a_warning(ready):
    device = RecordingDevice()
    pool = HostPool.allocate(device, 1 << 16, 1 << 10)
    start = pool.slots.data_ptr()
    if ready:
        pool.wait_ready(60)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        del pool
        gc.collect()
    assert [str(each.message) for each in told] == [
        "not closed: host pool of 65536 slots of 1024 bytes"
    ]
    assert told[0].category is ResourceWarning
    until(lambda: not mapped(start) and not threads_of_ours())
    assert sorted(device.unregistered) == sorted(address for address, _ in device.registered)


def test_a_closed_pool_goes_without_a_word():
    pool = HostPool.allocate(HostDevice(), 4, 64)
    pool.close()
    del pool
    gc.collect()


def test_no_thread_touches_the_pool_after_close(monkeypatch):
    touching, begun = [], threading.Event()

    def slowly(piece):
        touching.append(piece)
        begun.set()
        time.sleep(0.05)
        touching.remove(piece)

    monkeypatch.setattr(preparation_module, "_populate", slowly)
    pool = HostPool.allocate(HostDevice(), 64, 256 << 10)
    assert begun.wait(60)
    pool.close()
    assert not touching
    assert not threads_of_ours()


def test_closing_waits_for_no_more_than_the_piece_that_is_being_pinned(monkeypatch):
    monkeypatch.setattr(host_pool_module, "_MAX_PIECE_BYTES", mmap.PAGESIZE)
    begun, go_on = threading.Event(), threading.Event()

    class SlowDevice(RecordingDevice):
        def register(self, host: torch.Tensor) -> bool:
            begun.set()
            assert go_on.wait(60)
            return super().register(host)

    device = SlowDevice()
    pool = HostPool.allocate(device, 5, mmap.PAGESIZE)
    assert begun.wait(60)
    with ThreadPoolExecutor() as threads:
        closed = threads.submit(pool.close)
        until(lambda: pool._preparation._closing)
        go_on.set()
        closed.result(60)
    assert len(device.registered) == 1
    assert device.unregistered == [device.registered[0][0]]


@pytest.mark.parametrize("step", ["register", "touch", "unregister", "all"])
def test_whatever_raises_everything_is_freed_and_nothing_twice(step, monkeypatch):
    monkeypatch.setattr(host_pool_module, "_MAX_PIECE_BYTES", 16 << 10)
    monkeypatch.setattr(preparation_module.os, "cpu_count", lambda: 2)
    injected = RuntimeError("injected")

    class FailingDevice(RecordingDevice):
        def register(self, host: torch.Tensor) -> bool:
            if step in ("register", "all") and len(self.registered) == 3:
                raise injected
            return super().register(host)

        def unregister(self, host: torch.Tensor) -> None:
            super().unregister(host)
            if step in ("unregister", "all"):
                raise injected

    if step == "touch":
        start, count = preparation_module.OwnThread, itertools.count()

        def fail(*args):
            if next(count) == 3:
                raise injected
            return start(*args)

        monkeypatch.setattr(preparation_module, "OwnThread", fail)
    device = FailingDevice()
    pool = HostPool.allocate(device, 7, 16 << 10)
    address = pool.slots.data_ptr()
    pool.wait_ready(60)
    assert pool.pin_error is (None if step == "unregister" else injected)
    assert pool.pinned is (step == "unregister")
    for turn in range(2):
        if turn == 0 and step in ("unregister", "all"):
            with pytest.raises(RuntimeError, match="injected") as raised:
                pool.close()
            del raised
        else:
            pool.close()
    injected.__traceback__ = None
    assert len(device.registered) == {"touch": 0, "unregister": 7}.get(step, 3)
    assert sorted(device.unregistered) == [place for place, _ in device.registered]
    gc.collect()
    assert not mapped(address)
    assert not threads_of_ours()


def test_waiting_for_a_pool_that_is_closed_ends():
    gate = threading.Event()

    class SlowDevice(HostDevice):
        def register(self, host: torch.Tensor) -> bool:
            return gate.wait(60)

    pool = HostPool.allocate(SlowDevice(), 4, 64)
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(pool.wait_ready, 60)
        closing = threads.submit(pool.close)
        with pytest.raises(RuntimeError, match="closed before it was ready"):
            waiting.result(60)
        gate.set()
        closing.result(60)


def test_pieces_of_slots_that_are_no_os_pages_are_whole_pages_all_the_same(monkeypatch):
    monkeypatch.setattr(host_pool_module, "_MAX_PIECE_BYTES", 8 * mmap.PAGESIZE)
    device = RecordingDevice()
    pool = HostPool.allocate(device, 30, 3072)  # three OS pages hold four slots
    pool.wait_ready(60)
    assert pool.piece_slots == 8
    start = pool.slots.data_ptr()
    assert [(a - start, n) for a, n in device.registered] == [
        (24576 * i, 24576 if i < 3 else 18432) for i in range(4)
    ]
    assert all(address % mmap.PAGESIZE == 0 for address, _ in device.registered)
    pool.close()


def test_where_no_piece_is_small_enough_each_is_as_small_as_can_be(monkeypatch):
    """Never all of the pool: one call for 512 GiB fails, and stalls the process for a minute."""
    monkeypatch.setattr(host_pool_module, "_MAX_PIECE_BYTES", 2 * mmap.PAGESIZE)
    pool = HostPool.allocate(RecordingDevice(), 30, 3072)
    assert pool.piece_slots == 4
    pool.close()


def test_a_forked_child_unpins_nothing(monkeypatch):
    device = RecordingDevice()
    pool = HostPool.allocate(device, 4, 64)
    pool.wait_ready(60)
    monkeypatch.setattr(preparation_module.os, "getpid", lambda: -1)  # as in a child
    pool.close()
    assert device.registered
    assert not device.unregistered


def test_a_step_that_outlives_its_pool_unpins():
    begun, go_on = threading.Event(), threading.Event()

    class SlowDevice(RecordingDevice):
        def register(self, host: torch.Tensor) -> bool:
            begun.set()
            assert go_on.wait(60)
            return super().register(host)

    device = SlowDevice()
    pool = HostPool.allocate(device, 4, 64)
    assert begun.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del pool  # waits for nobody
        gc.collect()
    assert not device.unregistered
    go_on.set()
    until(lambda: device.unregistered)
    assert device.unregistered == [place for place, _ in device.registered]
    until(lambda: not threads_of_ours())
