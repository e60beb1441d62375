"""The order of functions' jobs on the slots of the pool, among each other and with the device's."""

from __future__ import annotations

import random
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from gated import GatedDevice, gated_world
from oracle import POISON, World

from triton_offload.specs import CPULoadStoreSpec, GPULoadStoreSpec, LoadStoreSpec
from triton_offload.transfer.queue_manager import OffloadingQueueManager
from triton_offload.transfer.slot_order import SlotOrder


class Disk(LoadStoreSpec):
    """A medium of a user's own, of which the bytes are kept here."""

    def __init__(self, rows: torch.Tensor | None = None) -> None:
        self.rows = rows


@pytest.fixture
def device():
    return GatedDevice()


@pytest.fixture
def world(device):
    with gated_world(device) as world:
        world.pool.slots.fill_(POISON)
        yield world
        Tier.gate.set()


class Tier:
    """Reads slots into Disk.rows and writes them from there, while the gate is open."""

    gate = threading.Event()

    def __init__(self, world: World, num_threads: int = 2) -> None:
        self.world = world
        self.gate.set()
        self.started = threading.Semaphore(0)
        world.queue.register_worker(CPULoadStoreSpec, Disk, self.read, num_threads)
        world.queue.register_worker(Disk, CPULoadStoreSpec, self.write, num_threads)

    def read(self, src: CPULoadStoreSpec, dst: Disk) -> int:
        self.started.release()
        assert self.gate.wait(60)
        dst.rows = self.world.pool.slots[torch.from_numpy(src.slot_ids.copy())]
        return dst.rows.nbytes

    def write(self, src: Disk, dst: CPULoadStoreSpec) -> int:
        self.started.release()
        assert self.gate.wait(60)
        assert src.rows is not None
        self.world.pool.slots[torch.from_numpy(dst.slot_ids.copy())] = src.rows
        return src.rows.nbytes


def store(world, blocks, slots):
    return world.queue.transfer_async(GPULoadStoreSpec(blocks), CPULoadStoreSpec(slots, fresh=True))


def load(world, slots, blocks):
    return world.queue.transfer_async(CPULoadStoreSpec(slots), GPULoadStoreSpec(blocks))


def to_disk(world, slots):
    disk = Disk()
    return world.queue.transfer_async(CPULoadStoreSpec(slots), disk), disk


def from_disk(world, slots, value=7):
    rows = torch.full((len(slots), 64), value, dtype=torch.uint8)
    return world.queue.transfer_async(Disk(rows), CPULoadStoreSpec(slots))


def succeed(world, *jobs):
    results = {result.job_id: result for result in world.finish(*jobs)}
    assert all(results[job].success for job in jobs), results


def not_started(tier: Tier, job: int) -> None:
    """As far as can be seen in a moment; where it starts anyway, the bytes tell later."""
    with pytest.raises(TimeoutError):
        tier.world.queue.wait([job], 0.05)
    assert not tier.started.acquire(blocking=False)


def test_a_function_reads_what_stores_before_it_write(world, device):
    tier = Tier(world)
    device.gate.clear()
    stores = [store(world, [1, 2], [3, 4]), store(world, [5], [5])]
    job, disk = to_disk(world, [5, 4])
    not_started(tier, job)
    device.gate.set()
    succeed(world, *stores, job)
    assert torch.equal(disk.rows, world.tensors[0][[5, 2]])


def test_a_function_writes_when_loads_before_it_have_read(world, device):
    tier = Tier(world)
    succeed(world, store(world, [1, 2], [3, 4]))
    pages = world.tensors[0].clone()
    device.gate.clear()
    under_way = load(world, [3, 4], [8, 9])
    job = from_disk(world, [4])
    not_started(tier, job)
    device.gate.set()
    succeed(world, under_way, job)
    assert torch.equal(world.tensors[0][8:10], pages[1:3])
    assert bool((world.pool.slots[4] == 7).all())


def test_a_function_writes_when_stores_before_it_have_written(world, device):
    tier = Tier(world)
    device.gate.clear()
    under_way = store(world, [1], [3])
    job = from_disk(world, [3])
    not_started(tier, job)
    device.gate.set()
    succeed(world, under_way, job)
    assert bool((world.pool.slots[3] == 7).all())


def test_a_function_waits_for_no_more_than_it_must(world, device):
    """Not for those who read what it reads, nor for other slots."""
    Tier(world)
    succeed(world, store(world, [1], [3]))
    device.gate.clear()
    under_way = [load(world, [3], [8]), store(world, [1], [5])]
    read, disk = to_disk(world, [3])
    wrote = from_disk(world, [6])
    world.queue.wait([read, wrote], 10)  # though the device stands still
    assert torch.equal(disk.rows, world.tensors[0][[1]])
    device.gate.set()
    succeed(world, *under_way, read, wrote)


@pytest.mark.parametrize("function", ["reads", "writes"])
@pytest.mark.parametrize("direction", ["store", "load"])
def test_a_device_job_is_refused_while_a_function_uses_its_slots(world, function, direction):
    tier = Tier(world)
    succeed(world, store(world, [0, 1, 2, 3], [0, 1, 2, 3]))
    tier.gate.clear()
    job = to_disk(world, [2])[0] if function == "reads" else from_disk(world, [2])

    def submit() -> int:
        return store(world, [8, 9], [1, 2]) if direction == "store" else load(world, [1, 2], [8, 9])

    if (function, direction) == ("reads", "load"):
        succeed(world, submit())
    else:
        before = world.pool.slots.clone(), world.tensors[0].clone()
        with pytest.raises(RuntimeError, match=rf"got slot 2 of job {job}, .*wait for it first"):
            submit()
        world.queue._check()
        assert torch.equal(world.pool.slots, before[0])
        assert torch.equal(world.tensors[0], before[1])
    succeed(world, store(world, [8], [1]))  # other slots
    tier.gate.set()
    world.queue.wait([job], 20)
    succeed(world, submit())  # at once: what was waited for has left its slots
    world.queue._order._check()
    assert not world.queue._order._slots


def test_a_load_is_refused_where_a_writer_waits_behind_readers(world):
    tier = Tier(world)
    tier.gate.clear()
    read, _ = to_disk(world, [2])
    wrote = from_disk(world, [2])
    with pytest.raises(RuntimeError, match=rf"slot 2 of job {wrote},"):
        load(world, [2], [8])
    tier.gate.set()
    succeed(world, read, wrote)


def test_slots_that_the_pool_has_not_are_no_reason_to_wait(world, device):
    Tier(world)
    device.gate.clear()
    under_way = store(world, [1], [3])
    assert world.pool.num_slots == 16
    seen = []

    def look(src: CPULoadStoreSpec, dst: LoadStoreSpec) -> None:
        seen.append(src.slot_ids.tolist())

    class Elsewhere(CPULoadStoreSpec):
        """Slots of another pool."""

    world.queue.register_worker(Elsewhere, Disk, look)
    job = world.queue.transfer_async(Elsewhere([-1, 0, 15, 16, 10**12]), Disk())
    world.queue.wait([job], 60)
    device.gate.set()
    succeed(world, under_way, job)
    assert seen == [[-1, 0, 15, 16, 10**12]]


def test_no_function_enters_while_a_device_job_is_submitted(world, device):
    """Else it would look for jobs to wait for just before that one is there."""
    tier = Tier(world)
    pipeline = world.queue._workers[GPULoadStoreSpec, CPULoadStoreSpec]._pipeline
    submit, entered = pipeline.submit, []

    def enter() -> None:
        entered.append(to_disk(world, [3]))

    def slow_submit(*args, **kwargs):
        thread.start()
        tier.started.acquire(timeout=0.1)  # never, as it should be
        return submit(*args, **kwargs)

    thread = threading.Thread(target=enter)
    pipeline.submit = slow_submit
    device.gate.clear()
    stored = store(world, [1], [3])
    pipeline.submit = submit
    thread.join(60)
    device.gate.set()
    ((job, disk),) = entered
    succeed(world, stored, job)
    assert torch.equal(disk.rows, world.tensors[0][[1]])


def test_functions_on_the_same_slots_run_in_the_order_of_their_submission(world):
    """A writer, readers side by side, and a writer again, by workers with threads to spare."""
    tier = Tier(world, num_threads=4)
    tier.gate.clear()
    first = from_disk(world, [1, 2], value=1)
    reads = [to_disk(world, [2, 1]), to_disk(world, [2])]
    last = from_disk(world, [2], value=2)
    after, disk = to_disk(world, [1, 2])
    assert tier.started.acquire(timeout=20)
    not_started(tier, after)
    tier.gate.set()
    succeed(world, first, *(job for job, _ in reads), last, after)
    assert all(bool((each.rows == 1).all()) for _, each in reads)
    assert disk.rows[:, 0].tolist() == [1, 2]


def test_a_job_that_waits_for_its_slots_can_be_cancelled_and_blocks_nobody(world):
    tier = Tier(world, num_threads=4)
    world.pool.slots[2] = 5
    tier.gate.clear()
    read, disk = to_disk(world, [2])
    assert tier.started.acquire(timeout=20)
    wrote = from_disk(world, [2])
    behind, same = to_disk(world, [2])
    assert not tier.started.acquire(timeout=0.05)
    assert world.queue.cancel([wrote, read]) == {wrote}
    assert tier.started.acquire(timeout=20)  # the reader behind it reads beside the first
    tier.gate.set()
    succeed(world, read, behind)
    assert bool((disk.rows == 5).all())
    assert bool((same.rows == 5).all())
    assert bool((world.pool.slots[2] == 5).all())
    assert not world.queue._order._slots


def test_a_job_that_reads_and_writes_one_slot_waits_for_itself_not(world):
    moved = []

    def move(src: CPULoadStoreSpec, dst: CPULoadStoreSpec) -> int:
        moved.append((src.slot_ids.tolist(), dst.slot_ids.tolist()))
        return 64

    world.queue.register_worker(CPULoadStoreSpec, CPULoadStoreSpec, move, num_threads=2)
    specs = [([1, 2, 2], [2, 3]), ([2], [1]), ([3], [3])]
    jobs = [world.queue.transfer_async(CPULoadStoreSpec(a), CPULoadStoreSpec(b)) for a, b in specs]
    succeed(world, *jobs)
    assert sorted(moved) == sorted(specs)
    assert not world.queue._order._slots


def test_a_wait_for_the_device_that_raises_fails_its_job_alone(world):
    Tier(world)

    def fail(slot_ids, *, writing):
        raise OSError("no device")

    world.queue._order.waits_for_device.append(fail)
    job, _ = to_disk(world, [1])
    (result,) = world.finish(job)
    assert isinstance(result.error, OSError)
    world.queue._order.waits_for_device.remove(fail)
    succeed(world, store(world, [1], [1]))
    succeed(world, to_disk(world, [1])[0])


@pytest.mark.parametrize("seed", range(10))
def test_a_turn_has_come_when_nobody_before_it_is_in_its_way(seed):
    rng = random.Random(seed)
    order = SlotOrder()
    turns = []  # (turn, reads, writes), in the order of entering

    def in_the_way(a, b) -> bool:
        return bool(a[2] & (b[1] | b[2]) or b[2] & a[1])

    for number in range(300):
        if turns and rng.random() < 0.55:
            turn, _, _ = turns.pop(rng.randrange(len(turns)))
            turn.leave()
            turn.leave()
        else:
            reads, writes = ({rng.randrange(5) for _ in range(rng.randrange(3))} for _ in "ab")
            specs = CPULoadStoreSpec(sorted(reads)), CPULoadStoreSpec(sorted(writes))
            turns.append((order.enter(number, *specs), reads, writes))
        order._check()
        for i, mine in enumerate(turns):
            free = not any(in_the_way(mine, other) for other in turns[:i])
            assert mine[0].come.is_set() == free
    for turn, _, _ in turns:
        turn.leave()
    assert not order._slots


def test_many_threads_never_meet_on_a_slot_nor_wait_in_a_circle():
    """Several workers, of one thread and of more, jobs on several slots, and cancelling."""

    class Other(LoadStoreSpec):
        pass

    manager = OffloadingQueueManager()
    lock, users, errors = threading.Lock(), Counter(), []

    def use(reads, writes) -> int:
        with lock:
            errors.extend(slot for slot in writes if users[slot])
            errors.extend(slot for slot in reads if users[slot] < 0)
            users.update(dict.fromkeys(reads, 1))
            users.subtract(dict.fromkeys(writes, 100))
        threading.Event().wait(0.0002)
        with lock:
            users.subtract(dict.fromkeys(reads, 1))
            users.update(dict.fromkeys(writes, 100))
        return 1

    for medium, threads in ((Disk, 1), (Other, 3)):
        manager.register_worker(
            CPULoadStoreSpec, medium, lambda a, b: use(set(a.slot_ids.tolist()), ()), threads
        )
        manager.register_worker(
            medium, CPULoadStoreSpec, lambda a, b: use((), set(b.slot_ids.tolist())), threads
        )
    jobs, cancelled = [], set()

    def submit(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            slots = CPULoadStoreSpec(rng.choices(range(6), k=rng.randrange(1, 4)))
            medium = rng.choice([Disk, Other])()
            job = manager.transfer_async(*rng.sample([slots, medium], 2))
            with lock:
                jobs.append(job)
            if rng.random() < 0.1:
                taken = manager.cancel([job])
                with lock:
                    cancelled.update(taken)

    threads = [threading.Thread(target=submit, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    manager.wait(jobs, 20)
    results = {result.job_id: result for result in manager.get_finished()}
    assert not errors
    assert sorted(results) == sorted(jobs)
    assert {job for job in jobs if not results[job].success} == cancelled
    manager._order._check()
    assert not manager._order._slots
    manager.shutdown(60)


def test_ids_of_a_spec_are_any_array():
    order = SlotOrder()
    first = order.enter(1, Disk(), CPULoadStoreSpec(np.array([3, 3, 1], dtype=np.int32)))
    second = order.enter(2, CPULoadStoreSpec([3]), Disk())
    assert first.come.is_set()
    assert not second.come.is_set()
    first.leave()
    assert second.come.is_set()


def test_a_function_waits_for_each_lane_of_the_device(world, device, monkeypatch):
    succeed(world, store(world, [1, 2], [3, 4]))
    device.gate.clear()
    ordinary = [load(world, [3], [8]), load(world, [4], [9]), load(world, [5], [10])]
    specs = CPULoadStoreSpec([4]), GPULoadStoreSpec([11])
    expedited = world.queue.transfer_async(*specs, expedited=True)
    stored = store(world, [1], [3])
    worker = world.queue._worker_for(GPULoadStoreSpec, CPULoadStoreSpec)
    waited = []
    with monkeypatch.context() as patch:
        patch.setattr(worker._pipeline, "wait", lambda job: waited.append(job.job_id))
        worker.wait_for_slots(np.array([3, 4]), writing=True)
        assert sorted(waited) == [ordinary[1], expedited, stored]
        waited.clear()
        worker.wait_for_slots(np.array([3, 4]), writing=False)
        assert waited == [stored]
    device.gate.set()
    succeed(world, *ordinary, expedited, stored)


def test_slots_below_the_pools_first_are_no_reason_to_wait(world, device):
    """numpy would take them for its last ones."""
    Tier(world)
    device.gate.clear()
    under_way = store(world, [1], [15])
    seen = threading.Event()

    class Elsewhere(CPULoadStoreSpec):
        pass

    world.queue.register_worker(Elsewhere, Disk, lambda src, dst: seen.set())
    job = world.queue.transfer_async(Elsewhere([-1]), Disk())
    assert seen.wait(10)  # though the device stands still
    device.gate.set()
    succeed(world, under_way, job)


def test_who_leaves_waits_no_longer():
    order = SlotOrder()
    first = order.enter(1, Disk(), CPULoadStoreSpec([3]))
    second = order.enter(2, CPULoadStoreSpec([3, 4]), Disk())
    second.leave()
    assert second.come.is_set()
    second.wait()
    third = order.enter(3, Disk(), CPULoadStoreSpec([4]))
    assert third.come.is_set()
    order._check()
    first.leave()
    third.leave()
    assert not order._slots
