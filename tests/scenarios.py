"""Small schedules, each for a rule that a random one rarely puts to the test.

Each takes a seed and raises AssertionError (a race included) or Stuck where a rule was broken.
"""

from __future__ import annotations

import random
from contextlib import suppress

import torch
from random_program import RandomProgram
from scenario_bench import Bench, bench
from schedules import CROSSING_PATHS, HYBRID, NUM_BUFFERS, SINGLE

from triton_offload.calibration import Path
from triton_offload.errors import ChecksumError
from triton_offload.offloader import KVOffloader
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import (
    CPULoadStoreSpec,
    GPULoadStoreSpec,
    TransferResult,
    TransferStatus,
)
from triton_offload.testing import Rates, SimulatedDevice
from triton_offload.testing.engine import CacheShape
from triton_offload.testing.prefill import Prefill
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.pipeline import PipelineOptions
from triton_offload.transfer.queue_manager import transfer_queue
from triton_offload.transfer.ranges import SLICE_BYTES


def _compute_for_ever(bench: Bench) -> None:
    bench.device.faults.never_ends("engine writes")
    bench.memory.write(0, [bench.memory.shape.num_blocks - 1], bench.rng)


def earlier_compute_only(seed: int) -> None:
    """Jobs end, one of them from the backlog, although the engine computes on and a later job
    waits for that."""
    options = {"window_chunks": 1} if seed % 2 else {"max_indices": 1 << 10}
    with bench(seed, **options) as b:
        jobs = [b.store(range(8), range(4)), b.store(range(8, 16), range(4, 8))]
        _compute_for_ever(b)
        b.store(range(16, 20), range(8, 10))
        b.end(*jobs)
        b.memory.host_reads(range(8))


def pages_after_their_release(seed: int) -> None:
    """The pages of a job that is mostly in the backlog are written as soon as they may be."""
    with bench(seed, window_chunks=1) as b:
        job = b.store(range(16), range(8))
        while not b.queue.source_released(job):
            b.device.sleep(0.001)
        b.memory.write(0, range(16), b.rng)
        b.end(job)
        b.device.drain()
        b.memory.check_all()


def a_load_that_waits(seed: int) -> None:
    """A load's scatter waits for compute: its copies do not, nor does any other lane."""
    with bench(seed) as b:
        b.end(b.store(range(8), range(4)), b.store(range(8, 12), range(4, 6)))
        _compute_for_ever(b)
        b.load(range(8), range(4))
        b.device.drain()
        assert b.device.to_device.busy > 0, "no chunk is in staging before compute has ended"
        side = b.device.new_stream("another compute stream")
        others = [
            b.store(range(12, 16), range(6, 8), stream=side),
            b.load(range(16, 20), range(4, 6), expedited=True, stream=side),
        ]
        results = b.end(*others)
        assert all(results[job].success for job in others)


def two_stores_of_a_slot(seed: int) -> None:
    """The second one takes another path, so that it ends on another stream than the first."""
    with bench(seed, paths=CROSSING_PATHS) as b:
        b.store(range(8), range(4))
        b.end(b.store(range(8, 10), range(3, 4)))
        b.device.drain()
        b.memory.check_all()


def two_stores_and_a_load(seed: int) -> None:
    """Two stores end on different streams; the load of what both wrote waits for the second."""
    with bench(seed, paths=CROSSING_PATHS) as b:
        b.store(range(8), range(4))
        b.store(range(8, 10), range(4, 5))
        b.end(b.load(range(10, 20), range(5)))
        b.device.drain()
        b.memory.check_all()


def burst(seed: int) -> None:
    """Far more work than a stream holds, at once."""
    with bench(seed, SINGLE, max_indices=1 << 16) as b:
        for _ in range(40):
            b.store(range(12), range(12))
        assert b.device.num_blocked == 0, "a submission blocked the host"


def burst_of_batches(seed: int) -> None:
    """The same in batches of ranges, of which each takes room in the stream."""
    shape = CacheShape(tensors=((4, 4),) * 20, blocks_per_chunk=1)
    with bench(seed, shape, paths=Path.COPY_ENGINE, max_indices=1 << 16) as b:
        for _ in range(60):
            b.store(range(12), range(12))
        assert b.device.num_blocked == 0, "a submission blocked the host"


def nobody_calls(seed: int) -> None:
    """The engine submits, and never asks."""
    with bench(seed, window_chunks=1) as b:
        b.store(range(16), range(8))
        for _ in range(300):
            b.device.sleep(0.001)
        b.device.drain()
        b.memory.check_all()


def capture(seed: int) -> None:
    """The engine captures a graph: a transfer would become part of it."""
    with bench(seed) as b:
        b.device.is_capturing = True
        before = b.device.num_operations
        with suppress(RuntimeError):
            b.store(range(2), range(1))
        assert b.device.num_operations == before, "something was queued into a captured graph"


def fails_half_way(seed: int) -> None:
    """A job's second segment cannot be queued by any path while the first is under way. The pages
    and slots are used by others the moment that the failure is reported."""
    for path in Path:
        with bench(seed, paths=path) as b:
            b.end(b.store(range(8), range(4)))
            storing = b.rng.random() < 0.5
            kernel = "gather" if storing else "scatter"
            broken = [kernel, "copy_batch"]
            if path is Path.COPY_ENGINE:
                broken.reverse()
            b.device.faults.in_call(broken[0], 2)
            b.device.faults.in_call(broken[1], 1)
            if storing:
                job = b.store(range(8, 16), range(4))
                if b.rng.random() < 0.5:  # another lane is at the same slots at once
                    b.load(range(16, 24), range(4))
            else:
                job = b.load(range(8, 16), range(4))
            result = b.poll(job)
            assert result.status is TransferStatus.FAILED
            b.memory.write(0, range(8, 16), b.rng)
            if storing:
                b.load(range(8), range(4), expedited=True)
                b.device.touch(reads=[b.memory.pool.slots[slot] for slot in range(4)])


def fails_on_the_device(seed: int) -> None:
    """An operation fails when it runs: then its job has, too."""
    with bench(seed) as b:
        b.device.faults.in_run(b.rng.choice(("gather", "copy")), b.rng.randint(1, 3))
        job = b.store(range(8), range(4))
        if b.end(job)[job].success:
            b.memory.host_reads(range(4))


def a_slot_after_a_failure(seed: int) -> None:
    """A store fails before it has cleared its slots; the next one leaves nothing of what was
    there."""
    with bench(seed, HYBRID) as b:
        b.end(b.store(range(8), range(4)))
        b.device.faults.in_call("copy", 1, times=2)
        job = b.store(range(8, 16), range(4), group=1)
        assert not b.end(job)[job].success
        b.end(b.store(range(8, 16), range(4), group=1))
        b.memory.host_reads(range(4))


def a_copy_that_never_ends(seed: int) -> None:
    with bench(seed) as b:
        b.device.faults.never_ends("copy", b.rng.randint(1, 4))
        job = b.store(range(8), range(4))
        try:
            b.queue.wait([job], 0.5)
        except TimeoutError:
            pass
        else:
            raise AssertionError("wait returned, and the bytes have not landed")
        assert not b.queue.get_finished(), "reported before it was over"
        try:
            b.queue.shutdown(0.5)
        except TimeoutError:
            pass
        else:
            raise AssertionError("shutdown returned, and a copy is under way")


def shutdown(seed: int) -> None:
    """What has started lands before `shutdown` returns."""
    with bench(seed, window_chunks=1 if seed % 2 else None) as b:
        b.store(range(16), range(8))
        b.queue.shutdown()
        b.memory.host_reads(range(8))
        assert not b.device.background_names, "a feeder still runs"
        assert len(b.device.streams) == 2, "streams are still open"
        try:
            b.store(range(2), range(1))
        except RuntimeError:
            return
        raise AssertionError("a job was accepted after shutdown")


def small_copy_in_turn(seed: int) -> None:
    """A copy engine that serves streams in turn: the engine's small copy waits for a slice."""
    waited = _small_copy(PipelineOptions(path=Path.STAGED, buffer_bytes=4 * SLICE_BYTES), True)
    slice_seconds = SLICE_BYTES / Rates().link
    assert waited < 1.5 * slice_seconds, f"a small copy waited {waited / slice_seconds:.1f} slices"


def small_copy_first_in_first_out(seed: int) -> None:
    """One that serves first in, first out: it waits for what the window lets queue ahead."""
    options = PipelineOptions(
        path=Path.STAGED, buffer_bytes=SLICE_BYTES, window_bytes=2 * SLICE_BYTES
    )
    waited = _small_copy(options, False)
    slice_seconds = SLICE_BYTES / Rates().link
    assert waited < 2.5 * slice_seconds, f"a small copy waited {waited / slice_seconds:.1f} slices"


def _small_copy(options: PipelineOptions, in_turn: bool) -> float:
    """How long a copy of the engine's own waits that comes amid a big load, in seconds."""
    with SimulatedDevice(timing_only=True, in_turn=in_turn) as device:
        count, size = 128, 1 << 20
        layout = CacheLayout([device.empty(count * size).view(count, size)], 1)
        rows = torch.empty((count, size), dtype=torch.uint8)
        device.register(rows)
        pool = HostPool.from_tensor(device, rows, pinned=True)
        queue = transfer_queue(layout, pool, options=options)
        queue.transfer_async(CPULoadStoreSpec(range(count)), GPULoadStoreSpec(range(count)))
        device.sleep(1e-4)
        stream, landed = device.new_stream("the engine's copies"), device.new_event()
        before = device.monotonic()
        device.copy(device.empty(4096), rows[0, :4096], stream)
        device.record(landed, stream)
        device.synchronize(landed, None)
        waited = device.monotonic() - before
        queue.shutdown()
        return waited


def layers_beside_compute(seed: int) -> None:
    """A load by layers beside a prefill of the same length: whatever the seed, for virtual time
    has one order."""
    prefill = Prefill(64 << 20, Path.STAGED)
    step = prefill.step(by_layers=True)
    prefill.close()
    assert step.first_share <= 0.05, f"the first layer starts at {step.first_share:.3f}"
    assert step.over <= 1.10, f"the step ends at {step.over:.3f} of the longer"


def offloader(seed: int) -> None:
    """A program that is its own engine, with a pool that holds little of what it stores: chunks
    are evicted, stores fail, all is forgotten now and then."""
    rng = random.Random(seed)
    with SimulatedDevice(seed) as device:
        pages = device.empty(16 * 32).view(16, 32)
        options = PipelineOptions(path=Path.STAGED, buffer_bytes=64, num_buffers=NUM_BUFFERS)
        program = RandomProgram(device, pages, rng)
        with KVOffloader([pages], 5 * 64, 2, options=options, device=device) as program.offloader:
            for _ in range(60):
                program.step()
        assert not device.background_names


def before_the_pool_is_pinned(seed: int) -> None:
    """The first job is submitted while the pool is being pinned; zero copy was asked for."""
    with SimulatedDevice(seed) as device:
        pages = device.empty(16 * 32).view(16, 32)
        options = PipelineOptions(path=Path.ZERO_COPY, buffer_bytes=64)
        with KVOffloader([pages], 8 * 64, 2, options=options, device=device) as offloader:
            job = offloader.store([b"a", b"b"], range(4))
            job.block()
            assert job.result is not None
            assert job.result.success, f"the job failed: {job.result.error}"


def flipped_bits(seed: int) -> None:
    """A bit flips during a copy, of a store or of a load."""
    with SimulatedDevice(seed) as device:
        pages = device.empty(8 * 16).view(8, 16)
        pages.random_(generator=torch.Generator().manual_seed(seed))
        options = PipelineOptions(path=Path.STAGED, buffer_bytes=64, max_indices=32, verify="load")
        with KVOffloader([pages], "1KiB", 2, device=device, options=options) as offloader:
            device.faults.flip_bit("copy", nth=1 + seed % 2 * 2)  # every other one has sums
            offloader.store([b"a"], [0, 1]).wait()
            job = offloader.load([b"a"], [2, 3])
            job.block()
            assert job.result is not None
            assert isinstance(job.result.error, ChecksumError), "a flipped bit was not found"


def slot_stored_again(seed: int) -> None:
    """A slot is stored, loaded and stored anew, and all that has run before anybody asks."""
    with SimulatedDevice(seed) as device:
        pages = device.empty(3 * 16).view(3, 16)
        pages.random_(generator=torch.Generator().manual_seed(seed))
        layout = CacheLayout([pages])
        slots = torch.zeros(1, 16, dtype=torch.uint8)
        device.register(slots)
        pool = HostPool.from_tensor(device, slots, pinned=True)
        options = PipelineOptions(path=Path.STAGED, buffer_bytes=64, max_indices=32, verify="load")
        queue = transfer_queue(layout, pool, options=options)
        slot = CPULoadStoreSpec([0], True)
        jobs = [
            queue.transfer_async(GPULoadStoreSpec([0]), slot),
            queue.transfer_async(slot, GPULoadStoreSpec([2])),
            queue.transfer_async(GPULoadStoreSpec([1]), slot),
        ]
        device.drain()
        queue.wait(jobs)
        results: list[TransferResult] = []
        while len(results) < len(jobs):
            results += queue.get_finished()
        assert all(result.success for result in results), results
        queue.shutdown()
        pool.close()
        device.unregister(slots)
