"""Jobs: ids, results, failures, cancelling, waiting, shutting down."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from gated import GatedDevice, gated_world
from oracle import World, random_pages

from triton_offload.calibration import Path
from triton_offload.device.host import HostDevice
from triton_offload.specs import (
    CPULoadStoreSpec,
    GPULoadStoreSpec,
    LoadStoreSpec,
    TransferStatus,
)
from triton_offload.transfer.pipeline import PipelineOptions
from triton_offload.transfer.queue_manager import OffloadingQueueManager, transfer_queue


@pytest.fixture
def device():
    return GatedDevice()


@pytest.fixture
def world(device):
    with gated_world(device, 32, buffer_bytes=256) as world:
        yield world


def store(world, blocks, slots=None):
    return world.queue.transfer_async(
        GPULoadStoreSpec(blocks), CPULoadStoreSpec(blocks if slots is None else slots, fresh=True)
    )


def load(world, slots, blocks, **kwargs):
    return world.queue.transfer_async(CPULoadStoreSpec(slots), GPULoadStoreSpec(blocks), **kwargs)


def test_wait_keeps_results_and_ignores_unknown_ids(world):
    job = store(world, [1, 2])
    world.queue.wait([job, 12345], 60)
    (result,) = world.queue.get_finished()
    assert (result.job_id, result.num_bytes) == (job, 128)
    assert result.seconds > 0
    assert world.queue.get_finished() == []
    world.queue.wait([job], 60)


def test_wait_raises_on_a_timeout_and_the_job_goes_on(world, device):
    device.gate.clear()
    job = store(world, [1])
    with pytest.raises(TimeoutError, match=f"job {job} "):
        world.queue.wait([job], 0.05)
    assert world.queue.get_finished() == []
    device.gate.set()
    assert world.finish(job)[0].success


def test_submission_does_not_block_whatever_is_in_flight(world, device):
    device.gate.clear()
    start = time.perf_counter()
    jobs = [store(world, list(range(32))) for _ in range(200)]
    # 200 jobs of 8 segments are more than may be queued; a device that stands still is the limit
    assert time.perf_counter() - start < 20
    device.gate.set()
    results = world.finish(*jobs)
    assert [r.job_id for r in results] == jobs
    assert all(r.success for r in results)


def test_the_feeder_queues_the_backlog_where_nobody_calls(world, device):
    device.gate.clear()
    for _ in range(200):
        store(world, list(range(32)))
    pages = world.tensors[0].clone()
    device.gate.set()
    deadline = time.monotonic() + 60
    while not torch.equal(world.pool.slots, pages) and time.monotonic() < deadline:
        time.sleep(0.01)
    world.tensors[0].add_(1)  # the last of the 200 jobs must read this, for it starts later
    job = store(world, list(range(32)))
    while not torch.equal(world.pool.slots, world.tensors[0]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert torch.equal(world.pool.slots, world.tensors[0])
    world.queue.wait([job], 60)


def test_cancel_takes_back_what_has_not_started(world, device):
    device.gate.clear()
    jobs = [store(world, list(range(32))) for _ in range(120)]
    cancelled = world.queue.cancel(jobs)
    assert cancelled
    assert jobs[0] not in cancelled
    assert world.queue.cancel(cancelled) == set()
    device.gate.set()
    results = world.finish(*jobs)
    assert [r.job_id for r in results] == jobs
    for result in results:
        wanted = TransferStatus.CANCELLED if result.job_id in cancelled else TransferStatus.SUCCESS
        assert result.status is wanted


def test_a_cancelled_store_leaves_its_slots_alone(world, device):
    pages = world.tensors[0].clone()
    world.finish(store(world, list(range(32))))
    device.gate.clear()
    # The first jobs reach the pool's staging; the one to be cancelled would write other pages.
    jobs = [store(world, list(range(32))) for _ in range(120)]
    last = store(world, list(range(31, -1, -1)), list(range(32)))
    assert world.queue.cancel([last]) == {last}
    device.gate.set()
    world.finish(*jobs, last)
    assert torch.equal(world.pool.slots, pages)


def test_an_operation_that_fails_fails_its_job_alone(world, device):
    device.fail_running = {"gather"}
    bad = store(world, [1, 2])
    device.fail_running = set()
    good = store(world, [3, 4], [10, 11])
    results = {r.job_id: r for r in world.finish(bad, good)}
    assert results[bad].status is TransferStatus.FAILED
    assert "gather failed" in str(results[bad].error)
    assert results[bad].num_bytes == 0
    assert results[good].success
    assert torch.equal(world.pool.slots[10:12], world.tensors[0][3:5])


def test_a_failed_load_is_reported_only_when_nothing_of_it_can_land(world, device):
    world.finish(store(world, list(range(16))))
    device.gate.clear()
    device.fail_running = {"scatter"}
    job = load(world, list(range(16)), list(range(16, 32)))
    time.sleep(0.05)
    assert world.queue.get_finished() == []
    device.gate.set()
    (result,) = world.finish(job)
    assert result.status is TransferStatus.FAILED
    pages = world.tensors[0].clone()
    time.sleep(0.05)
    assert torch.equal(world.tensors[0], pages)


def test_a_path_that_cannot_be_queued_falls_back_and_is_not_chosen_again(world, device):
    device.fail_submission = {"gather", "scatter"}
    pages = world.tensors[0].clone()
    jobs = [store(world, list(range(32))), load(world, list(range(16)), list(range(16, 32)))]
    results = world.finish(*jobs)
    assert all(r.success for r in results), results
    assert torch.equal(world.pool.slots, pages)
    assert torch.equal(world.tensors[0][16:], pages[:16])
    device.fail_submission = {"copy_batch"}  # the staged path works again, and is not tried
    (result,) = world.finish(store(world, [1]))
    assert result.status is TransferStatus.FAILED
    assert "copy_batch could not be queued" in str(result.error)


@pytest.mark.parametrize("path", Path)
def test_later_jobs_work_after_every_path_failed_once(device, path):
    world = World.build(
        [random_pages(32, 64, 64, 0, 1)],
        num_slots=32,
        device=device,
        options=PipelineOptions(path=path, buffer_bytes=256),
    )
    device.fail_submission = {"gather", "copy_batch"}
    (result,) = world.finish(store(world, [1, 2, 3]))
    assert result.status is TransferStatus.FAILED
    device.fail_submission = set()
    (result,) = world.finish(store(world, [1, 2, 3]))
    assert result.success
    assert torch.equal(world.pool.slots[1:4], world.tensors[0][1:4])
    world.close()


@pytest.mark.parametrize(
    ("src", "dst", "message"),
    [
        (GPULoadStoreSpec([32]), CPULoadStoreSpec([0]), r"block_ids: expected ids in \[0, 32\)"),
        (GPULoadStoreSpec([-1]), CPULoadStoreSpec([0]), r"block_ids: expected ids in"),
        (GPULoadStoreSpec([1]), CPULoadStoreSpec([99]), r"slot_ids: expected ids in \[0, 32\)"),
        (GPULoadStoreSpec([1, 2]), CPULoadStoreSpec([3, 3]), "slot_ids: .*once, got 3"),
        (CPULoadStoreSpec([1, 2]), GPULoadStoreSpec([3, 3]), "block_ids: .*once, got 3"),
        (GPULoadStoreSpec([1, 2]), CPULoadStoreSpec([3]), "slot_ids: expected 2 slots"),
        (GPULoadStoreSpec([1]), CPULoadStoreSpec([3, 4]), "slot_ids: expected 1 slots"),
        (GPULoadStoreSpec([1], [1, 0], [0, 0]), CPULoadStoreSpec([3]), "group_sizes: expected one"),
        (GPULoadStoreSpec([1]), GPULoadStoreSpec([1]), "registered worker, got GPULoadStoreSpec"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_queued(world, src, dst, message):
    before = world.pool.slots.clone(), world.tensors[0].clone()
    with pytest.raises(ValueError, match=message):
        world.queue.transfer_async(src, dst)
    assert world.queue.get_finished() == []
    assert world.finish(store(world, [0]))[0].success
    before[0][0] = before[1][0]
    assert torch.equal(world.pool.slots, before[0])
    assert torch.equal(world.tensors[0], before[1])


def test_groups_that_share_a_tensor_may_not_load_the_same_block():
    world = World.build([random_pages(8, 16, 16, 0, 1)] * 1, groups=[[(0, 16)], [(0, 8)]])
    spec = GPULoadStoreSpec([1, 2, 2], [2, 1], [0, 0])
    with pytest.raises(ValueError, match="got block 2 in groups 0 and 1, which share a tensor"):
        world.queue.transfer_async(CPULoadStoreSpec([0, 1, 2]), spec)
    world.close()


def test_specs_refuse_what_is_not_a_list_of_ids():
    with pytest.raises(ValueError, match=r"block_ids: expected a one-dimensional.*\(1, 2\)"):
        GPULoadStoreSpec(np.array([[1, 2]]))
    with pytest.raises(ValueError, match=r"slot_ids: .*float64"):
        CPULoadStoreSpec([1.5])
    with pytest.raises(ValueError, match=r"group_sizes: .*the sum 2, got"):
        GPULoadStoreSpec([1, 2], [1])
    with pytest.raises(ValueError, match="fresh: expected 2 flags"):
        CPULoadStoreSpec([1, 2], [True])


def test_a_job_of_no_blocks_is_a_job(world):
    (result,) = world.finish(store(world, []))
    assert (result.status, result.num_bytes) == (TransferStatus.SUCCESS, 0)


def test_source_released_when_the_gather_has_read(world, device):
    device.gate.clear()
    job = store(world, [1])
    assert not world.queue.source_released(job)
    device.gate.set()
    world.queue.wait([job], 60)
    assert world.queue.source_released(job)
    world.queue.get_finished()
    assert world.queue.source_released(job)


def test_a_stream_waits_for_a_job_without_the_host(world, device):
    pages = world.tensors[0].clone()
    world.finish(store(world, list(range(8))))
    device.gate.clear()
    job = load(world, list(range(8)), list(range(8, 16)))
    stream = device.new_stream("engine")
    world.queue.wait_on(job, stream)
    out = torch.empty_like(pages[8:16])
    device.copy(out, world.tensors[0][8:16], stream)
    end = device.new_event()
    device.record(end, stream)
    assert not device.query(end)
    device.gate.set()
    device.synchronize(end, 60)
    assert torch.equal(out, pages[:8])
    device.close_stream(stream)


@pytest.mark.parametrize("path", Path)
@pytest.mark.parametrize("direction", ["store", "load"])
def test_pages_are_touched_only_after_what_the_engine_queued_before(device, path, direction):
    """Ordering rules 1 and 2: the engine still works on the pages when the job is submitted."""
    world = World.build(
        [random_pages(8, 64, 64, 0, 1)],
        device=device,
        options=PipelineOptions(path=path),
    )
    pages = world.tensors[0]
    world.finish(store(world, [0, 1, 2, 3]))
    before = pages[:4].clone()
    computing, stream = threading.Event(), device.new_stream("engine")
    stream.put(lambda: computing.wait(60))
    device.copy(pages[:4], torch.full((4, 64), 7, dtype=torch.uint8), stream)
    specs = [GPULoadStoreSpec([0, 1, 2, 3]), CPULoadStoreSpec([0, 1, 2, 3])]
    if direction == "load":
        specs.reverse()
    job = world.queue.transfer_async(*specs, stream=stream)
    with pytest.raises(TimeoutError):
        world.queue.wait([job], 0.1)
    assert torch.equal(pages[:4], before)
    computing.set()
    world.finish(job)
    if direction == "store":
        assert bool((world.pool.slots[:4] == 7).all())
    else:
        assert torch.equal(pages[:4], before)  # the load came after the engine's write
    device.close_stream(stream)
    world.close()


def test_shutdown_under_load_ends_every_job_and_every_thread(device):
    threads = threading.active_count()
    world = World.build(
        [random_pages(32, 64, 64, 0, 1)],
        num_slots=32,
        device=device,
        options=PipelineOptions(path=Path.STAGED, buffer_bytes=256),
    )
    device.gate.clear()
    for _ in range(200):
        store(world, list(range(32)))
    threading.Timer(0.1, device.gate.set).start()
    world.queue.shutdown(60)
    world.queue.shutdown()
    assert world.queue.get_finished() == []
    world.queue.wait([1, 2, 3])
    with pytest.raises(RuntimeError, match="shut down"):
        store(world, [1])
    world.pool.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads


def test_shutdown_raises_where_the_device_does_not_finish(device):
    world = World.build([random_pages(4, 64, 64, 0, 1)], device=device)
    device.gate.clear()
    store(world, [1])
    with pytest.raises(TimeoutError):
        world.queue.shutdown(0.05)
    with pytest.raises(RuntimeError, match="shut down"):
        store(world, [1])
    device.gate.set()
    world.close()


def test_many_threads_submit_and_wait(world):
    pages = world.tensors[0].clone()
    ids: list[int] = []
    errors: list[BaseException] = []

    def serve(number: int) -> None:
        try:
            mine = list(range(4 * number, 4 * number + 4))
            for _ in range(25):
                jobs = [store(world, mine), load(world, mine, mine)]
                ids.extend(jobs)
                world.queue.wait(jobs, 60)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    results = world.queue.get_finished()
    assert sorted(r.job_id for r in results) == sorted(ids) == sorted(set(ids))
    assert all(r.success for r in results)
    assert torch.equal(world.tensors[0], pages)
    assert torch.equal(world.pool.slots, pages)


class Disk(LoadStoreSpec):
    def __init__(self, name: str) -> None:
        self.name = name


def test_a_function_is_a_worker_of_its_own_medium():
    manager = OffloadingQueueManager()
    written: list[str] = []
    gate = threading.Event()

    def write(src: CPULoadStoreSpec, dst: Disk) -> int:
        assert gate.wait(60)
        if dst.name == "bad":
            raise OSError("disk full")
        written.append(dst.name)
        return 8 * len(src.slot_ids)

    manager.register_worker(CPULoadStoreSpec, Disk, write, num_threads=2)
    jobs = [manager.transfer_async(CPULoadStoreSpec([1, 2]), Disk(n)) for n in ("a", "bad", "c")]
    more = [manager.transfer_async(CPULoadStoreSpec([1]), Disk("never")) for _ in range(5)]
    cancelled = manager.cancel(more)
    assert cancelled == set(more)
    gate.set()
    manager.wait(jobs, 60)
    results = {r.job_id: r for r in manager.get_finished()}
    assert results[jobs[0]].num_bytes == 16
    assert isinstance(results[jobs[1]].error, OSError)
    assert results[jobs[2]].success  # the thread outlived the exception
    assert all(results[job].status is TransferStatus.CANCELLED for job in more)
    assert sorted(written) == ["a", "c"]
    with pytest.raises(ValueError, match="got a second for CPULoadStoreSpec to Disk"):
        manager.register_worker(CPULoadStoreSpec, Disk, write)
    manager.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        manager.transfer_async(CPULoadStoreSpec([1]), Disk("late"))


def test_an_unknown_path_or_too_small_slots_are_refused():
    world = World.build([random_pages(4, 64, 64, 0, 1)])
    with pytest.raises(ValueError, match=r"path: expected one of .*'auto'.*got 'fast'"):
        transfer_queue(world.layout, world.pool, path="fast")
    from triton_offload.pool.host_pool import HostPool

    pool = HostPool.allocate(HostDevice(), 4, 10)
    with pytest.raises(ValueError, match="pool: expected slots of at least 64 bytes, got 10"):
        transfer_queue(world.layout, pool)
    pool.close()
    world.close()
