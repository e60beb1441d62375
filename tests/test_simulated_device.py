"""The simulated device does what CUDA does, in every order, and nothing that CUDA would not."""

from __future__ import annotations

import inspect
import textwrap
from contextlib import suppress

import numpy as np
import pytest
import torch
from oracle import random_pages

from triton_offload.errors import DeviceLostError
from triton_offload.kernels import reference
from triton_offload.kernels.table import PageTable
from triton_offload.testing import InjectedError, RaceError, SimulatedDevice, Stuck

SEEDS = range(40)


def buffers(device: SimulatedDevice, count: int, size: int = 16) -> list[torch.Tensor]:
    return [device.empty(size) for _ in range(count)]


def pinned(device: SimulatedDevice, size: int = 16) -> torch.Tensor:
    host = torch.zeros(size, dtype=torch.uint8)
    device.register(host)
    return host


def fill(device: SimulatedDevice, buffer: torch.Tensor, value: int, stream=None):
    return device.launch(
        f"fill {value}",
        stream or device.compute_stream,
        writes=[buffer],
        run=lambda: buffer.fill_(value),
    )


def test_the_example_of_the_docstring_runs_and_finds_its_missing_line():
    text = textwrap.dedent(inspect.getdoc(SimulatedDevice))
    example = text.split("```python\n")[1].split("```")[0]
    exec(compile(example, "example", "exec"), {"SimulatedDevice": SimulatedDevice})
    broken = "\n".join(line for line in example.splitlines() if "without this line" not in line)
    broken = broken.replace("assert (staging == 7).all()", "pass")
    with pytest.raises(RaceError, match=r"copy of device buffer 1.*write on compute"):
        exec(compile(broken, "example", "exec"), {"SimulatedDevice": SimulatedDevice})


def test_the_same_seed_gives_the_same_order_and_other_seeds_give_others():
    def trace(seed: int) -> str:
        device = SimulatedDevice(seed)
        a, b, c = (device.new_stream(name) for name in "abc")
        for i in range(5):
            for stream in (a, b, c):
                fill(device, device.empty(4), i, stream)
        device.drain()
        return device.trace()

    assert trace(3) == trace(3)
    assert len({trace(seed) for seed in SEEDS}) > len(SEEDS) / 2


def test_nothing_runs_when_it_is_queued_by_itself():
    ran_late = 0
    for seed in SEEDS:
        device = SimulatedDevice(seed)
        (buffer,) = buffers(device, 1)
        fill(device, buffer, 7)
        ran_late += bool((buffer == 0xA5).all())
        device.drain()
        assert (buffer == 7).all()
    assert ran_late == len(SEEDS)


def test_a_wait_binds_the_latest_record_at_the_time_of_the_call():
    for seed in SEEDS:
        with SimulatedDevice(seed) as device:
            first, second, out = buffers(device, 3)
            other, event = device.new_stream("other"), device.new_event()
            fill(device, first, 1)
            device.record(event, device.compute_stream)
            device.wait(other, event)
            fill(device, second, 2)
            device.record(event, device.compute_stream)
            device.copy(out, first, other)  # ordered by the wait
            device.drain()
            assert (out == 1).all()
            assert not device.races
            device.copy(out, second, other)  # which does not speak of the second record
            assert len(device.races) == 1
            device.races.clear()


def test_an_event_that_was_never_recorded_does_not_block():
    device = SimulatedDevice(0)
    event = device.new_event()
    assert device.query(event)
    device.synchronize(event, None)
    device.wait(device.compute_stream, event)
    fill(device, device.empty(4), 1)
    device.drain()


def test_a_query_sees_a_later_record():
    device = SimulatedDevice(0)
    event, other = device.new_event(), device.new_stream("other")
    device.record(event, other)
    device.drain()
    assert device.query(event)
    hang = device.new_event()
    device.faults.never_ends("fill 1")
    fill(device, device.empty(4), 1)
    device.record(hang, device.compute_stream)
    device.record(event, device.compute_stream)
    device.drain()
    assert not device.query(event)


@pytest.mark.parametrize("registered", [True, False])
def test_host_memory_is_read_when_the_copy_runs_and_pageable_memory_when_it_is_queued(registered):
    seen = set()
    for seed in SEEDS:
        device = SimulatedDevice(seed)
        (out,) = buffers(device, 1)
        host = pinned(device) if registered else torch.zeros(16, dtype=torch.uint8)
        stream = device.new_stream("copies")
        device.copy(out, host, stream)
        host.fill_(9)
        device.drain()
        seen.add(int(out[0]))
        assert device.num_blocked == (0 if registered else 1)
    assert seen == ({9} if registered else {0})


def test_a_copy_to_pageable_memory_blocks_until_it_has_landed():
    for seed in SEEDS:
        device = SimulatedDevice(seed)
        (pages,) = buffers(device, 1)
        host = torch.zeros(16, dtype=torch.uint8)
        fill(device, pages, 5)
        device.copy(host, pages, device.compute_stream)
        assert (host == 5).all()
        assert device.num_blocked == 1


def test_a_full_queue_blocks_the_host():
    device = SimulatedDevice(1, max_queued=4)
    for i in range(20):
        fill(device, device.empty(4), i)
        assert device.compute_stream.pending <= 4
    # A device that got on between the calls leaves less to block for.
    assert 0 < device.num_blocked <= 16


@pytest.mark.parametrize(("count", "blocked"), [(3, 0), (4, 1), (9, 1)])
def test_a_batch_takes_room_for_each_of_its_ranges(count, blocked):
    idle = next(seed for seed in SEEDS if not SimulatedDevice(seed)._simulation._eagerness)
    with SimulatedDevice(idle, max_queued=4) as device:  # nothing runs but what must
        source, target = buffers(device, 2)
        fill(device, source, 5)
        places, ones = np.arange(count), np.ones(count, dtype=np.int64)
        ends = target.data_ptr() + places, source.data_ptr() + places
        device.copy_batch(*ends, ones, device.compute_stream)
        assert device.num_blocked == blocked
        device.drain()
        assert (target[:count] == 5).all()


def test_the_legacy_stream_synchronises_with_blocking_streams_only():
    for seed in SEEDS:
        with SimulatedDevice(seed) as device:
            a, b, c, d = buffers(device, 4)
            blocking, free = device.new_blocking_stream("blocking"), device.new_stream("free")
            fill(device, a, 1, blocking)
            device.copy(b, a, device.legacy_stream)
            device.copy(c, b, blocking)
            assert not device.races
            device.copy(d, c, free)
            assert len(device.races) == 1
            device.races.clear()
            device.drain()
            assert (c == 1).all()


def test_ranges_of_a_batch_are_in_no_order():
    last = set()
    for seed in SEEDS:
        device = SimulatedDevice(seed)
        one, two, out = buffers(device, 3)
        one.fill_(1), two.fill_(2)
        to = np.array([out.data_ptr()] * 2)
        device.copy_batch(
            to, np.array([one.data_ptr(), two.data_ptr()]), np.array([16, 16]), device.legacy_stream
        )
        device.drain()
        last.add(int(out[0]))
    assert last == {1, 2}


def test_copies_of_one_engine_are_serial_and_those_of_two_overlap():
    device = SimulatedDevice(0, timing_only=True)
    size = 55_000_000  # a millisecond
    there, back = device.empty(size), device.empty(size)
    host, other = pinned(device, size), pinned(device, size)
    streams = [device.new_stream(f"{i}") for i in range(3)]
    device.copy(there, host, streams[0])
    device.copy(back, host, streams[1])
    device.copy(other, there[:size], streams[2])
    device.drain()
    ends = sorted(stream.last.end for stream in streams)
    assert ends[0] == pytest.approx(1e-3, rel=0.02)
    assert ends[1] == pytest.approx(1e-3, rel=0.02)
    assert ends[2] == pytest.approx(2e-3, rel=0.02)
    assert device.to_device.busy == pytest.approx(2e-3, rel=0.02)


@pytest.mark.parametrize("knows", ["event", "query", "nothing"])
def test_the_host_may_touch_what_it_knows_to_be_done(knows):
    device = SimulatedDevice(4)
    (pages,) = buffers(device, 1)
    host = pinned(device)
    event = device.new_event()
    device.copy(host, pages, device.compute_stream)
    device.record(event, device.compute_stream)
    device.drain()
    if knows == "event":
        device.synchronize(event, None)
    elif knows == "query":
        assert device.query(event)
    device.touch(reads=[host])
    assert bool(device.races) == (knows == "nothing")


def kernel_world(device: SimulatedDevice, seed: int = 0):
    tensors = [random_pages(8, 12, 16, 4, seed), random_pages(8, 5, 5, 0, seed + 1)]
    table = PageTable(tensors, 3)
    slots = device.empty(4 * table.slot_bytes).view(4, -1)
    device.prepare(table, slots)
    ids = device.empty_indices(8)
    return tensors, table, slots, ids


@pytest.mark.parametrize("kind", ["gather", "scatter"])
def test_a_kernel_moves_what_the_reference_moves_and_claims_those_bytes_alone(kind):
    device = SimulatedDevice(0)
    tensors, table, slots, ids = kernel_world(device)
    slots.copy_(random_pages(4, table.slot_bytes, table.slot_bytes, 0, 9))
    ids[:5] = torch.tensor([6, 1, 2, 7, 0])
    ids[5:7] = torch.tensor([3, 1])
    before = [slots.clone(), *(t.clone() for t in tensors)]
    getattr(device, kind)(
        table, ids[:5], slots, ids[5:7], 1, device.compute_stream, zero_copy=False
    )
    device.drain()
    got = [slots.clone(), *(t.clone() for t in tensors)]
    for memory, old in zip([slots, *tensors], before, strict=True):
        memory.copy_(old)
    getattr(reference, f"{kind}_pages")(table, [6, 1, 2, 7, 0], slots, [3, 1], 1)
    for found, expected in zip(got, [slots, *tensors], strict=True):
        assert torch.equal(found, expected)
    # A byte that the kernel did not write is nobody's business; one that it wrote is a race.
    other = device.new_stream("other")
    for memory, old in zip([slots, *tensors], before, strict=True):
        rows, width = memory.shape
        for row in range(rows):
            for byte in range(width):
                device.races.clear()
                device.launch("probe", other, reads=[memory[row, byte : byte + 1]])
                written = bool(memory[row, byte] != old[row, byte])
                if written:
                    assert device.races, (row, byte)
    device.races.clear()
    untouched = [5] if kind == "gather" else [3, 4, 5]
    for block in untouched:
        device.launch("probe", other, writes=[tensors[0][block]])
    assert not device.races


def test_ids_that_the_host_rewrites_too_early_are_a_race_however_lucky():
    for seed in SEEDS:
        device = SimulatedDevice(seed)
        _, table, slots, ids = kernel_world(device)
        ids[:2] = torch.tensor([1, 0])
        kernel = table, ids[:1], slots, ids[1:2], 0, device.compute_stream
        device.gather(*kernel, zero_copy=False)
        done = device.new_event()
        device.record(done, device.compute_stream)
        device.drain()
        if seed % 2:
            assert device.query(done)
        ids[:2] = torch.tensor([2, 1])
        device.gather(*kernel, zero_copy=False)
        device.drain()
        assert bool(device.races) == (seed % 2 == 0)


def test_unregistering_memory_under_a_copy_is_a_race():
    device = SimulatedDevice(0)
    (pages,) = buffers(device, 1)
    host = pinned(device)
    device.copy(host, pages, device.compute_stream)
    device.unregister(host)
    with pytest.raises(RaceError, match=r"unregistering.*behind.*copy"):
        device.check()


def test_a_kernel_on_host_memory_that_is_not_registered_loses_the_device():
    device = SimulatedDevice(0)
    _, table, _, ids = kernel_world(device)
    slots = torch.zeros(4, table.slot_bytes, dtype=torch.uint8)
    ids[:2] = torch.tensor([1, 0])
    kernel = table, ids[:1], slots, ids[1:2], 0, device.compute_stream
    device.gather(*kernel, zero_copy=True)
    device.drain()
    assert not slots.any()
    with pytest.raises(DeviceLostError, match="not registered"):
        device.gather(*kernel, zero_copy=True)


def test_waiting_for_what_never_ends_is_stuck_or_times_out():
    device = SimulatedDevice(0)
    device.faults.never_ends("copy")
    (pages,) = buffers(device, 1)
    event = device.new_event()
    device.copy(pinned(device), pages, device.compute_stream)
    device.record(event, device.compute_stream)
    before = device.monotonic()
    with pytest.raises(TimeoutError, match=r"within 3\.0 s"):
        device.synchronize(event, 3.0)
    assert device.monotonic() >= before + 3.0
    with pytest.raises(Stuck, match="queue #1 copy"):
        device.synchronize(event, None)


def test_a_failure_comes_out_at_the_first_record_behind_it_and_no_other():
    device = SimulatedDevice(0)
    device.faults.in_run("fill 1")
    before, behind, later = (device.new_event() for _ in range(3))
    device.record(before, device.compute_stream)
    fill(device, device.empty(4), 1)
    device.record(behind, device.compute_stream)
    device.record(later, device.compute_stream)
    device.drain()
    assert device.query(before)
    with pytest.raises(InjectedError, match="fill 1"):
        device.query(behind)
    assert device.query(later)


def test_a_sticky_fault_loses_the_device():
    device = SimulatedDevice(0)
    device.faults.in_run("fill 1", sticky=True)
    (buffer,) = buffers(device, 1)
    event = device.new_event()
    device.record(event, device.compute_stream)
    fill(device, device.empty(4), 1)
    with suppress(DeviceLostError):  # the device may have got there already
        fill(device, buffer, 2)
    device.drain()
    for call in (lambda: device.query(event), lambda: fill(device, buffer, 3)):
        with pytest.raises(DeviceLostError, match="injected"):
            call()
    assert (buffer == 0xA5).all()
    device.close_stream(device.compute_stream)


def test_background_functions_run_where_the_host_blocks_and_stop():
    device = SimulatedDevice(0)
    ran: list[float] = []
    task = device.background("ticker", lambda: ran.append(device.monotonic()) or 0.001)
    fill(device, device.empty(4), 1)
    assert not ran
    for _ in range(50):
        device.sleep(0.001)
    assert ran
    task.stop()
    count = len(ran)
    for _ in range(50):
        device.sleep(0.001)
    assert len(ran) == count
    assert device.background_names == []


def test_a_simulation_that_is_too_big_to_check_says_so():
    device = SimulatedDevice(0)
    buffer = device.empty(8 << 20)
    with pytest.raises(ValueError, match="expected at most 4194304 bytes"):
        fill(device, buffer, 1)
