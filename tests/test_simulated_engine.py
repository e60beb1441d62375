"""The serving engine of the simulations notices what it should: wrong bytes, jobs that are reported
wrongly or never, and arguments that somebody kept."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from schedules import HYBRID, ODD

from triton_offload.specs import CPULoadStoreSpec, GPULoadStoreSpec, TransferResult, TransferStatus
from triton_offload.testing import SimulatedDevice
from triton_offload.testing.engine import CacheShape, EngineMemory
from triton_offload.testing.serving import ServingEngine
from triton_offload.transfer.layout import CacheLayout

SHAPES = {"odd": ODD, "hybrid": HYBRID, "one": CacheShape()}


def memory_of(device: SimulatedDevice, shape: CacheShape = SHAPES["one"]) -> EngineMemory:
    memory = EngineMemory(device, shape)
    for block in range(shape.num_blocks):
        memory.write(0, [block], random.Random(block))
    return memory


# -- the memory and its model --


@pytest.mark.parametrize("name", SHAPES)
def test_the_model_of_a_store_and_a_load_is_what_the_slot_format_says(name):
    """Byte for byte, for a run that begins inside of a chunk."""
    shape = SHAPES[name]
    memory = memory_of(SimulatedDevice(0), shape)
    size, padded = shape.blocks_per_chunk, [page for page, _ in shape.tensors]
    groups = shape.groups or [[(i, page) for i, page in enumerate(padded)]]
    blocks, first = np.array([7, 3, 5]), size - 1
    slots = np.array([4, 2, 9])[: -(-(first + len(blocks)) // size)]
    fresh = slots == 2
    for group, members in enumerate(groups):
        memory.slots[:] = 0xEE
        expected = memory.slots.copy()
        expected[2, : memory.layout.slot_bytes] = 0  # the one that is fresh
        cache = memory.cache.copy()
        starts = np.cumsum([0, *(stride * shape.num_blocks + 16 for _, stride in shape.tensors)])
        for i, block in enumerate(blocks):
            chunk, position = divmod(first + i, size)
            for tensor, num_bytes in members:
                page = starts[tensor] + int(block) * shape.tensors[tensor][1]
                place = size * sum(padded[:tensor]) + position * padded[tensor]
                expected[slots[chunk], place : place + num_bytes] = cache[page : page + num_bytes]
        memory.model_store(group, blocks, slots, first, fresh)
        assert np.array_equal(memory.slots, expected)
        memory.cache[:] = 0x77
        saved = memory.snapshot(group, blocks)
        memory.model_load(group, blocks, slots, first)
        for tensor, num_bytes in members:
            for block in blocks:
                page = starts[tensor] + int(block) * shape.tensors[tensor][1]
                assert np.array_equal(
                    memory.cache[page : page + num_bytes], cache[page : page + num_bytes]
                )
        memory.restore(group, blocks, saved)
        assert (memory.cache == 0x77).all()
        memory.cache[:] = cache


def test_the_caches_layout_and_the_models_are_one():
    for shape in SHAPES.values():
        memory = memory_of(SimulatedDevice(0), shape)
        layout = CacheLayout(memory.tensors, shape.blocks_per_chunk, shape.groups)
        assert memory._rows.shape == (shape.num_slots, layout.slot_bytes + shape.row_gap)


def test_a_page_that_changed_is_seen_by_the_engine_that_reads_it():
    device = SimulatedDevice(0)
    memory = memory_of(device)
    device.drain()
    memory.read(0, [3, 4])
    device.drain()
    memory.check_reads()
    memory.tensors[1][4, 7] ^= 1
    memory.read(0, [3])
    device.drain()
    memory.check_reads()
    memory.read(0, [3, 4])
    device.drain()
    with pytest.raises(AssertionError, match=r"blocks \[4\] of group 0"):
        memory.check_reads()


@pytest.mark.parametrize("place", ["cache", "pool"])
def test_every_byte_is_compared_gaps_included(place):
    device = SimulatedDevice(0)
    memory = memory_of(device, ODD)
    device.drain()
    memory.check_all()
    held = memory._memory if place == "cache" else memory._rows.ravel()
    for byte in (0, 8, len(held) - 1):
        held[byte] ^= 1
        with pytest.raises(AssertionError, match=f"{place}: 1 wrong bytes, the first at {byte}"):
            memory.check_all()
        held[byte] ^= 1


def test_what_the_engine_and_the_host_touch_is_claimed():
    def races(touch: Callable[[SimulatedDevice, EngineMemory], None]) -> int:
        device = SimulatedDevice(0)
        memory = memory_of(device)
        event, other = device.new_event(), device.new_stream("other")
        device.record(event, device.compute_stream)
        device.synchronize(event, None)
        device.copy(memory.pool.slots[1], device.empty(memory.layout.slot_bytes), other)
        device.launch("a load", other, writes=[memory.tensors[0][2]])
        device.launch("a store", other, reads=[memory.tensors[0][5]])
        device.drain()
        memory.slots[1] = memory._rows[1]
        touch(device, memory)
        return len(device.races)

    rng = random.Random(0)
    assert races(lambda device, memory: memory.read(0, [1, 5])) == 0
    assert races(lambda device, memory: memory.read(0, [2])) == 1
    assert races(lambda device, memory: memory.write(0, [1, 6], rng)) == 0
    assert races(lambda device, memory: memory.write(0, [5], rng)) == 1
    assert races(lambda device, memory: memory.host_reads([0, 2])) == 0
    assert races(lambda device, memory: memory.host_reads([1])) == 1


# -- the engine --


class Queue:
    """Takes jobs, moves nothing, and says what a test tells it to."""

    def __init__(self) -> None:
        self.submitted: list[tuple[object, object]] = []
        self.results: list[TransferResult] = []
        self.streams_wait: list[int] = []
        self.waited: list[list[int]] = []
        self.released = True
        self.takes_back = False

    def transfer_async(self, src: object, dst: object, *, expedited: bool = False) -> int:
        self.submitted.append((src, dst))
        return len(self.submitted)

    def get_finished(self) -> list[TransferResult]:
        results, self.results = self.results, []
        return results

    def wait(self, job_ids: list[int]) -> None:
        self.waited.append(list(job_ids))

    def wait_on(self, job_id: int, stream: object) -> None:
        self.streams_wait.append(job_id)

    def source_released(self, job_id: int) -> bool:
        return self.released

    def cancel(self, job_ids: list[int]) -> set[int]:
        return set(job_ids) if self.takes_back else set()

    def end(self, *job_ids: int, status: TransferStatus = TransferStatus.SUCCESS) -> None:
        self.results += [TransferResult(job_id, status) for job_id in job_ids]


def engine_of(seed: int = 0, num_jobs: int = 3) -> tuple[ServingEngine, Queue]:
    """An engine that has submitted some stores."""
    device, queue = SimulatedDevice(seed), Queue()
    memory = EngineMemory(device, CacheShape())
    engine = ServingEngine(memory, queue, random.Random(seed))  # type: ignore[arg-type]
    while len(queue.submitted) < num_jobs:
        engine.prefill()
        engine.offload()
    return engine, queue


def test_a_job_that_is_reported_twice_is_noticed():
    engine, queue = engine_of()
    queue.end(1)
    engine.collect()
    queue.end(1)
    with pytest.raises(AssertionError, match="reported twice"):
        engine.collect()


def test_jobs_of_a_lane_that_are_reported_out_of_order_are_noticed():
    engine, queue = engine_of()
    queue.end(2)
    engine.collect()
    queue.end(1)
    with pytest.raises(AssertionError, match="jobs of a lane out of order"):
        engine.collect()


@pytest.mark.parametrize("status", [TransferStatus.FAILED, TransferStatus.CANCELLED])
def test_a_job_that_ended_otherwise_is_noticed(status):
    engine, queue = engine_of()
    queue.end(1, status=status)
    with pytest.raises(AssertionError, match=status.value):
        engine.collect()


def test_a_job_that_is_never_reported_is_noticed():
    engine, queue = engine_of()
    queue.end(1, 3)
    with pytest.raises(AssertionError, match=r"never reported: \[2\]"):
        engine.settle()


def test_a_wait_for_several_jobs_of_which_one_is_not_over_is_noticed(monkeypatch):
    counts = set()
    for seed in range(40):
        engine, queue = engine_of(seed)

        def wait(job_ids: list[int], queue: Queue = queue) -> None:
            queue.waited.append(job_ids)
            queue.end(*sorted(job_ids)[1:])

        queue.wait = wait  # type: ignore[method-assign]
        monkeypatch.setattr(engine.memory, "host_reads", lambda slots: None)
        with pytest.raises(AssertionError, match="were waited for, and are not reported"):
            engine.wait()
        counts.add(len(queue.waited[0]))
    assert counts == {1, 2, 3}


def test_pages_are_read_behind_the_load_that_brings_them():
    for seed in range(20):
        engine, queue = engine_of(seed)
        count = len(queue.submitted)
        while len(queue.submitted) == count:
            engine.reload("load")
        loading = [each for each in engine._requests if each.loading is not None]
        engine._requests = loading or engine._requests
        queue.streams_wait.clear()
        engine.decode()
        assert queue.streams_wait[:1] == [count + 1] * len(loading)


def test_blocks_under_transfer_are_handed_out_when_they_are_released():
    for seed in range(20):
        engine, queue = engine_of(seed)
        queue.released = False
        held = set().union(*(transfer.blocks for transfer in engine._transfers.values()))
        while engine._requests:
            engine.finish()
        told = set(queue.streams_wait)
        for job, transfer in engine._transfers.items():
            assert transfer.blocks.isdisjoint(engine._free)
            assert bool(transfer.blocks) == (job not in told)
        queue.released = True
        engine.finish()
        engine._hand_out()
        assert held <= set(engine._free)


def test_what_a_call_was_given_is_overwritten_when_it_returns(monkeypatch):
    given: list[tuple[str, object, object]] = []

    def note(name: str, original: Callable[..., None]) -> Callable[..., None]:
        def made(self: object, *arguments: object) -> None:
            original(self, *arguments)
            for argument in arguments:
                if isinstance(argument, np.ndarray):
                    given.append((name, argument, argument.copy()))
                elif isinstance(argument, list):
                    given.append((name, argument, list(argument)))

        return made

    for kind in (GPULoadStoreSpec, CPULoadStoreSpec):
        monkeypatch.setattr(kind, "__init__", note(kind.__name__, kind.__init__))
    engine_of(num_jobs=6)
    assert len(given) == 6 * 5  # ids, sizes, places; slots, flags
    for name, now, then in given[:5]:
        assert not np.array_equal(now, then), name


def test_a_job_that_was_taken_back_ends_as_cancelled_and_moves_nothing():
    engine, queue = engine_of()
    queue.takes_back = True
    engine._rng.random = lambda: 0.1  # type: ignore[method-assign]
    before = engine.memory.slots.copy()
    engine.offload()
    assert np.array_equal(engine.memory.slots, before)
    queue.end(1, 2, 3)
    queue.end(4, status=TransferStatus.CANCELLED)
    engine.settle()
