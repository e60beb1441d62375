"""The simulated device, part by part: its clock, its threads, its faults, and what it knows of
bytes. What CUDA does there as a whole: `test_simulated_device.py`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from triton_offload.kernels.table import PageTable
from triton_offload.testing import InjectedError, RaceError, Rates, SimulatedDevice, Stuck
from triton_offload.testing.races import RaceChecker


def fill(device: SimulatedDevice, buffer: torch.Tensor, value: int = 1, stream=None):
    return device.launch(
        f"fill {value}",
        stream or device.compute_stream,
        writes=[buffer],
        run=lambda: buffer.fill_(value),
    )


def pinned(device: SimulatedDevice, size: int = 16) -> torch.Tensor:
    host = torch.zeros(size, dtype=torch.uint8)
    device.register(host)
    return host


# -- background functions --


def count_calls(device: SimulatedDevice, *answers: float | None, sleeps: int = 40) -> list[float]:
    """When a function was called that answers so, and then that it sleeps."""
    left, times = list(answers), []

    def step() -> float | None:
        times.append(device.monotonic())
        return left.pop(0) if left else None

    device.background("ticker", step)
    for _ in range(sleeps):
        device.sleep(0.01)
    return times


def test_a_function_that_sleeps_is_called_when_it_is_woken():
    device = SimulatedDevice(0)
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1

    task = device.background("sleeper", step)
    for expected in (1, 2, 3):
        for _ in range(40):
            device.sleep(0.01)
        assert calls == expected
        task.wake()


def test_a_wake_up_while_it_runs_is_not_lost_and_it_runs_once_at_a_time():
    device = SimulatedDevice(0)
    running, calls = 0, 0

    def step() -> None:
        nonlocal running, calls
        running += 1
        calls += 1
        assert running == 1, "called while it runs"
        if calls < 4:
            task.wake()
            device.sleep(0.01)  # others have their turn
        running -= 1

    task = device.background("waker", step)
    for _ in range(60):
        device.sleep(0.01)
    assert calls == 4


def test_a_function_that_has_ended_is_not_called_again():
    device = SimulatedDevice(0)
    assert len(count_calls(device, 0.0, math.inf)) == 2
    assert device.background_names == []


def test_a_function_is_called_again_after_the_time_that_it_asked_for():
    device = SimulatedDevice(0, timing_only=True)
    times = count_calls(device, 0.05, 0.1)
    assert np.diff(times) == pytest.approx([0.05, 0.1])


def test_a_function_that_raised_is_called_again():
    device = SimulatedDevice(0)
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ValueError("once")

    task = device.background("raiser", step)
    with pytest.raises(ValueError, match="once"):
        device.sleep(0.01)
    task.wake()
    for _ in range(40):
        device.sleep(0.01)
    assert calls == 2


# -- what a test asks --


def test_leaving_the_device_runs_what_is_queued_and_reports_races():
    with SimulatedDevice(0) as device:
        buffer = device.empty(16)
        fill(device, buffer, 7)
    assert (buffer == 7).all()
    with pytest.raises(RaceError, match="fill 2"):
        race_in_a_simulation(0)


def race_in_a_simulation(seed: int, error: Exception | None = None) -> None:
    with SimulatedDevice(seed) as device:
        buffer = device.empty(16)
        fill(device, buffer, 1)
        fill(device, buffer, 2, device.new_stream("other"))
        if error is not None:
            raise error


def test_a_failure_in_it_names_the_races_behind_it():
    with pytest.raises(ValueError, match="wrong") as caught:
        race_in_a_simulation(5, ValueError("wrong"))
    (note,) = caught.value.__notes__
    assert note.startswith("race on byte 0 of device buffer 1: #2 fill 2 on other writes it")
    assert "SimulatedDevice(seed=5), last events:" in note


def test_what_the_host_writes_races_with_a_kernel_that_reads_it():
    device = SimulatedDevice(0)
    host = pinned(device)
    device.copy(device.empty(16), host, device.compute_stream)
    device.touch(writes=[host])
    assert len(device.races) == 1
    device.races.clear()
    device.touch(reads=[device.empty(16)])
    assert not device.races


def test_a_kernel_takes_as_long_as_it_says():
    device = SimulatedDevice(timing_only=True, rates=Rates(launch=1e-3))
    operation = device.launch("long", device.compute_stream, seconds=2e-3)
    device.drain()
    assert operation.end - operation.start == pytest.approx(3e-3)


# -- faults --


def calls_that_raise(device: SimulatedDevice, count: int = 5) -> list[int]:
    raised = []
    for i in range(1, count + 1):
        try:
            fill_zero(device)
        except InjectedError:
            raised.append(i)
    return raised


def fill_zero(device: SimulatedDevice) -> None:
    device.fill_zero(device.empty(4), device.compute_stream)


def test_a_call_raises_at_its_turn_as_often_as_asked_and_no_other():
    device = SimulatedDevice(0)
    device.faults.in_call("copy")
    device.faults.in_call("fill_zero", 2, times=2)
    assert calls_that_raise(device) == [2, 3]
    assert device.faults.num_struck == 2
    device.faults.in_call("fill_zero", times=math.inf)
    assert calls_that_raise(device) == [1, 2, 3, 4, 5]


def test_faults_that_were_cleared_strike_no_more():
    device = SimulatedDevice(0)
    faults = device.faults
    faults.in_call("fill_zero")
    faults.in_run("fill_zero")
    faults.never_ends("fill_zero")
    faults.refuse()
    faults.clear()
    faults.in_call("close_stream")  # another one is armed
    assert calls_that_raise(device) == []
    pinned(device)
    assert device.num_registered == 1
    event = device.new_event()
    device.record(event, device.compute_stream)
    device.synchronize(event, None)
    assert faults.num_struck == 0


def test_memory_is_refused_at_its_turn_and_nothing_is_registered():
    device = SimulatedDevice(0)
    device.faults.refuse(2)
    hosts = [torch.zeros(8, dtype=torch.uint8) for _ in range(3)]
    assert [device.register(host) for host in hosts] == [True, False, True]
    assert (device.num_registered, device.faults.num_struck) == (2, 1)


def test_what_hung_ends_when_it_is_let_go_on():
    device = SimulatedDevice(0)
    device.faults.never_ends("fill 1")
    buffer = device.empty(4)
    fill(device, buffer)
    device.drain()
    assert (buffer == 0xA5).all()
    device.end_hung()
    device.drain()
    assert (buffer == 1).all()


def test_the_first_failure_of_a_stream_is_the_one_that_comes_out():
    device = SimulatedDevice(0)
    device.faults.in_run("fill 1", error=InjectedError("the first"))
    device.faults.in_run("fill 2", error=InjectedError("the second"))
    for value in (1, 2):
        fill(device, device.empty(4), value)
    event = device.new_event()
    device.record(event, device.compute_stream)
    device.drain()
    with pytest.raises(InjectedError, match="the first"):
        device.query(event)


# -- time --


def test_what_follows_two_starts_when_both_have_ended():
    device = SimulatedDevice(timing_only=True)
    other, event = device.new_stream("other"), device.new_event()
    long = device.launch("long", device.compute_stream, seconds=1.0)
    short = device.launch("short", other, seconds=0.1)
    device.record(event, other)
    device.wait(device.compute_stream, event)
    last = device.launch("last", device.compute_stream)
    device.drain()
    assert short.end < long.end <= last.start


def order_of_copies(*, in_turn: bool) -> list[str]:
    """The streams of copies by one engine, as it served them."""
    device = SimulatedDevice(timing_only=True, in_turn=in_turn)
    host = pinned(device, 1 << 20)
    streams = [device.new_stream(name) for name in "ab"]
    for stream in streams:
        for _ in range(3):
            device.copy(device.empty(1 << 20), host, stream)
    device.drain()
    return [
        line.split()[-1] for line in device.trace().splitlines() if line.strip().startswith("run")
    ]


def test_what_one_stream_was_given_runs_in_that_order():
    for seed in range(20):
        device = SimulatedDevice(seed)
        host, pages = pinned(device), device.empty(16)
        for value in range(4):
            device.copy(host, pages, device.compute_stream)
            device.copy(pages, host, device.compute_stream)
            fill(device, pages, value)
        device.drain()
        lines = [line.split() for line in device.trace().splitlines()]
        ran = [int(words[1][1:]) for words in lines if words[0] == "run"]
        assert ran == sorted(ran)


def test_a_copy_engine_serves_streams_in_turn_or_first_in_first_out():
    assert order_of_copies(in_turn=True) == ["a", "b", "a", "b", "a", "b"]
    assert order_of_copies(in_turn=False) == ["a", "a", "a", "b", "b", "b"]


def test_the_time_between_two_events_is_that_of_what_lies_between():
    device = SimulatedDevice(timing_only=True)
    start, end = device.new_event(timed=True), device.new_event(timed=True)
    device.record(start, device.compute_stream)
    operation = device.launch("long", device.compute_stream, seconds=0.5)
    device.record(end, device.compute_stream)
    device.drain()
    assert device.elapsed(start, end) == pytest.approx(operation.end - operation.start, rel=0.01)


def test_a_host_that_sleeps_on_and_on_is_stuck():
    device = SimulatedDevice(0)

    def sleep_on() -> None:
        for _ in range(4000):
            device.sleep(0.001)

    with pytest.raises(Stuck, match="the host sleeps"):
        sleep_on()


# -- who knows of what --


def test_each_two_accesses_of_a_byte_must_be_in_order_if_one_of_them_writes():
    for first in ("reads", "writes"):
        for second in ("reads", "writes"):
            device = SimulatedDevice(0)
            buffer = device.empty(16)
            device.launch("first", device.compute_stream, **{first: [buffer[3:4]]})
            device.launch("second", device.new_stream("other"), **{second: [buffer]})
            assert len(device.races) == (first == second == "reads") ^ 1
            for race in device.races:
                assert race.first_access + "s" == first
                assert race.second_access + "s" == second
                assert race.place == "byte 3 of device buffer 1"


def test_what_the_host_saw_reached_all_streams_know():
    device = SimulatedDevice(0)
    buffer, event = device.empty(16), device.new_event()
    other = device.new_stream("other")
    fill(device, device.empty(16), 0, other)
    fill(device, buffer)
    device.record(event, device.compute_stream)
    device.synchronize(event, None)
    fill(device, buffer, 2, other)
    assert not device.races


def test_what_ran_on_a_stream_that_is_closed_is_over():
    device = SimulatedDevice(0)
    stream, host = device.new_stream("short-lived"), pinned(device)
    device.copy(host, device.empty(16), stream)
    device.close_stream(stream)
    device.touch(writes=[host])
    assert not device.races


def test_more_streams_than_there_was_room_for_are_told_apart():
    device = SimulatedDevice(0)
    buffer = device.empty(40)
    for i in range(40):  # each is used while there is room for no other
        stream = device.new_stream(f"{i}")
        fill(device, buffer[i : i + 1], i, stream)
    assert not device.races
    fill(device, buffer[17:18], 0, stream)
    assert len(device.races) == 1


def test_rows_apart_are_these_bytes_and_no_others():
    device = SimulatedDevice(0)
    rows = device.empty(64).view(4, 16)[:, :5]
    device.launch("rows", device.compute_stream, writes=[rows])
    whole, other = device.empty(0), device.new_stream("other")
    whole.set_(rows.untyped_storage())
    touched = []
    for byte in range(64):
        device.races.clear()
        device.launch("probe", other, reads=[whole[byte : byte + 1]])
        if device.races:
            touched.append(byte)
    assert touched == [row * 16 + byte for row in range(4) for byte in range(5)]


def test_every_byte_of_a_tensor_of_words_is_its():
    device = SimulatedDevice(0)
    words, bytes_ = device.empty(64).view(torch.int64), device.empty(64)
    device.copy(words, bytes_.view(torch.int64), device.compute_stream)
    device.launch("probe", device.new_stream("other"), writes=[bytes_[63:]])
    device.launch("probe", device.new_stream("another"), reads=[words.view(torch.uint8)[63:]])
    assert len(device.races) == 2


def test_no_more_races_are_kept_than_anybody_reads():
    device = SimulatedDevice(0)
    buffer = device.empty(4)
    fill(device, buffer)
    for i in range(50):
        fill(device, buffer, i, device.new_stream(f"{i}"))
    assert len(device.races) == RaceChecker.MOST


def test_memory_is_found_by_its_addresses_and_older_memory_there_is_gone():
    checker = RaceChecker()
    checker.add(100, 50, "a", on_device=True, pinned=True)
    checker.add(150, 10, "b", on_device=True, pinned=True)

    def names(*addresses: int) -> list[str | None]:
        found = [checker.find(address) for address in addresses]
        return [None if memory is None else memory.name for memory in found]

    assert names(99, 100, 149, 150, 159, 160) == [None, "a", "a", "b", "b", None]
    checker.add(120, 10, "c", on_device=True, pinned=True)
    assert names(105, 120, 129, 130, 150) == [None, "c", "c", None, "b"]


def test_a_race_names_the_memory_that_its_byte_lies_in():
    checker = RaceChecker()
    for name in "ab":
        checker.add(100 * ord(name), 50, name, on_device=True, pinned=True)
    names = [checker._place(cell) for cell in (0, 49, 50, 99)]
    assert names == ["byte 0 of a", "byte 49 of a", "byte 0 of b", "byte 49 of b"]
    device = SimulatedDevice(0)
    _, second = device.empty(16), device.empty(16)
    fill(device, second)
    fill(device, second, 2, device.new_stream("other"))
    assert device.races[0].place == "byte 0 of device buffer 2"


# -- copies and kernels --


def addresses(*tensors: torch.Tensor) -> np.ndarray:
    return np.array([tensor.data_ptr() for tensor in tensors])


def test_a_batch_touches_every_byte_of_its_ranges():
    device = SimulatedDevice(0)
    host, out = pinned(device, 32), device.empty(32)
    to, source = addresses(out, out[16:]), addresses(host[16:], host)
    device.copy_batch(to, source, np.array([16, 16]), device.compute_stream)
    for byte in (15, 31):
        device.launch("probe", device.new_stream(f"{byte}"), reads=[out[byte : byte + 1]])
    assert len(device.races) == 2


@pytest.mark.parametrize("stores", [True, False])
def test_a_batch_from_or_to_pageable_memory_blocks(stores):
    device = SimulatedDevice(0)
    pageable, pages = torch.zeros(16, dtype=torch.uint8), device.empty(16)
    device.touch(reads=[pageable])  # the simulation knows it from here on
    dst, src = (pageable, pages) if stores else (pages, pageable)
    device.copy_batch(addresses(dst), addresses(src), np.array([16]), device.compute_stream)
    assert device.num_blocked == 1
    assert torch.equal(dst, src)


def tables(device: SimulatedDevice) -> tuple[PageTable, torch.Tensor, torch.Tensor, torch.Tensor]:
    pages = device.empty(8 * 4).view(8, 4)
    pages.copy_(torch.arange(32).view(8, 4))
    table = PageTable([pages], 2)
    slots = [device.empty(3 * table.slot_bytes).view(3, -1) for _ in range(2)]
    return table, *slots, device.empty_indices(8)


def test_two_buffers_of_one_table_are_told_apart():
    device = SimulatedDevice(0)
    table, one, two, ids = tables(device)
    ids[:4] = torch.tensor([5, 3, 2, 0])
    for slots in (one, two):
        device.prepare(table, slots)
    stream = device.compute_stream
    device.gather(table, ids[:2], one, ids[2:3], 0, stream, zero_copy=False)
    device.gather(table, ids[1:2], two, ids[3:4], 1, stream, zero_copy=False)
    device.drain()
    assert one[2].tolist() == [20, 21, 22, 23, 12, 13, 14, 15]
    assert two[0].tolist() == [0xA5] * 4 + [12, 13, 14, 15]


def test_ids_are_looked_at_to_the_last_and_once():
    device = SimulatedDevice(0)
    table, slots, _, ids = tables(device)
    device.prepare(table, slots)
    ids[:3] = torch.tensor([5, 3, 2])

    def gather() -> None:
        stream = device.compute_stream
        device.gather(table, ids[:2], slots, ids[2:3], 0, stream, zero_copy=False)

    gather()
    ids[1] = 4
    gather()
    assert len(device.races) == 1, "the kernel may have read the last id too late"
    gather()
    gather()  # the host has written nothing since
    assert len(device.races) == 1


def test_the_trace_says_what_kernels_and_copies_were_given():
    device = SimulatedDevice(0)
    table, slots, out, ids = tables(device)
    device.prepare(table, slots)
    ids[:3] = torch.tensor([5, 3, 2])
    stream = device.compute_stream
    device.gather(table, ids[:2], slots, ids[2:3], 0, stream, zero_copy=False)
    device.copy(out[0], slots[2], stream)
    gather, copy = (line for line in device.trace().splitlines() if "queue" in line)
    assert f"gather of blocks [5, 3], chunks [2] of 3 slots at {slots.data_ptr():#x}" in gather
    assert "copy of device buffer 2[16:+8] to device buffer 3[0:+8] on compute" in copy
