"""Workers: what functions return, who moves which specs, waits for several ids, shutting down."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from gated import GatedDevice, gated_world
from oracle import POISON

from triton_offload.calibration import Path
from triton_offload.specs import (
    CPULoadStoreSpec,
    GPULoadStoreSpec,
    LoadStoreSpec,
    TransferResult,
    TransferStatus,
)
from triton_offload.transfer import worker as worker_module
from triton_offload.transfer.device_worker import DeviceWorker
from triton_offload.transfer.function_worker import FunctionWorker
from triton_offload.transfer.pipeline import PipelineOptions
from triton_offload.transfer.queue_manager import OffloadingQueueManager, transfer_queue
from triton_offload.transfer.worker import OffloadingWorker


class Disk(LoadStoreSpec):
    """A medium of a user's own."""


class Tape(Disk):
    """A kind of it."""


@pytest.fixture
def gate():
    """What a function waits for; it is open when the test has ended, well or not."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def manager(gate):
    manager = OffloadingQueueManager()
    yield manager
    gate.set()
    manager.shutdown(60)


@pytest.fixture
def device():
    return GatedDevice()


@pytest.fixture
def world(device):
    with gated_world(device) as world:
        world.pool.slots.fill_(POISON)
        yield world


def store(world, blocks, **kwargs):
    specs = GPULoadStoreSpec(blocks), CPULoadStoreSpec(blocks, fresh=True)
    return world.queue.transfer_async(*specs, **kwargs)


def finish(manager, *jobs):
    manager.wait(jobs, 20)
    return sorted(manager.get_finished(), key=lambda result: result.job_id)


def move_nothing(src, dst) -> int:
    return 0


# -- what a function returns --


@pytest.mark.parametrize(
    ("returned", "num_bytes"),
    [
        *[(0, 0), (17, 17), (np.int64(5), 5), (np.uint8(255), 255), (2**70, 2**70)],
        *[(True, 0), (np.True_, 0), (None, 0)],
    ],
)
def test_a_function_says_how_many_bytes_it_moved(manager, returned, num_bytes):
    manager.register_worker(Disk, Disk, lambda src, dst: returned)
    (result,) = finish(manager, manager.transfer_async(Disk(), Disk()))
    assert result.status is TransferStatus.SUCCESS
    assert (type(result.num_bytes), result.num_bytes) == (int, num_bytes)
    assert result.error is None


@pytest.mark.parametrize("returned", [False, np.False_])
def test_a_function_that_returns_false_has_failed(manager, returned):
    manager.register_worker(Disk, Disk, lambda src, dst: returned)
    (result,) = finish(manager, manager.transfer_async(Disk(), Disk()))
    assert result.status is TransferStatus.FAILED
    assert result.num_bytes == 0
    with pytest.raises(RuntimeError, match="returned False"):
        raise result.error


@pytest.mark.parametrize(
    "returned",
    [
        *[-1, np.int64(-1), 1.0, np.float32(2), "8", b"8", [], (1,), torch.tensor(8), object()],
        *[np.timedelta64(1, "s"), torch.tensor(False), float("nan"), np.array([1])],
    ],
    ids=lambda returned: repr(returned).partition(" at ")[0],
)
def test_anything_else_is_a_type_error_in_the_result(manager, returned):
    answers = [8, returned]
    manager.register_worker(Disk, Disk, lambda src, dst: answers.pop())
    bad, good = finish(manager, *(manager.transfer_async(Disk(), Disk()) for _ in range(2)))
    assert bad.status is TransferStatus.FAILED
    assert bad.num_bytes == 0
    assert isinstance(bad.error, TypeError)
    assert good.success  # the thread went on


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, OSError])
def test_what_a_function_raises_is_its_jobs(manager, error):
    answers = [8, error("mine")]

    def move(src, dst) -> int:
        answer = answers.pop()
        if isinstance(answer, int):
            return answer
        raise answer

    manager.register_worker(Disk, Disk, move)
    bad, good = finish(manager, *(manager.transfer_async(Disk(), Disk()) for _ in range(2)))
    assert (bad.status, type(bad.error), str(bad.error)) == (TransferStatus.FAILED, error, "mine")
    assert good.success


# -- what is registered --


async def coroutine(src, dst):
    return 8


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        (None, "worker: expected an OffloadingWorker or a function .*got None"),
        ("copy", "worker: expected an OffloadingWorker or a function .*got 'copy'"),
        (Disk, "worker: expected an OffloadingWorker or a function"),
        (coroutine, "worker: expected a function that blocks"),
        (DeviceWorker, r"worker: expected an instance, got the class .*pass DeviceWorker\(...\)"),
        (FunctionWorker, r"pass FunctionWorker\(...\)"),
    ],
)
def test_what_cannot_be_called_is_not_registered(manager, worker, message):
    with pytest.raises(TypeError, match=message):
        manager.register_worker(Disk, Disk, worker)
    manager.register_worker(Disk, Disk, move_nothing)


def test_a_function_worker_refuses_the_same():
    with pytest.raises(TypeError, match="function: expected an OffloadingWorker or a function"):
        FunctionWorker(5)
    with pytest.raises(ValueError, match="num_threads: expected an integer of at least 1, got 0"):
        FunctionWorker(move_nothing, 0)


@pytest.mark.parametrize("bad", [int, object, Disk(), None, "Disk", LoadStoreSpec | Disk])
def test_only_kinds_of_specs_are_registered(manager, bad):
    with pytest.raises(TypeError, match="src_cls: expected a subclass of LoadStoreSpec, got"):
        manager.register_worker(bad, Disk, move_nothing)
    with pytest.raises(TypeError, match="dst_cls: expected a subclass of LoadStoreSpec, got"):
        manager.register_worker(Disk, bad, move_nothing)


@pytest.mark.parametrize("bad", [0, -1, True, 1.0, "2", None, np.int64(0)])
def test_a_number_of_threads_is_a_positive_integer(manager, bad):
    with pytest.raises(ValueError, match="num_threads: expected an integer of at least 1, got"):
        manager.register_worker(Disk, Disk, move_nothing, bad)


def test_a_worker_of_its_own_threads_is_given_no_number(manager):
    worker = FunctionWorker(move_nothing, 2)
    with pytest.raises(ValueError, match=r"num_threads: .*got 2 beside a FunctionWorker"):
        manager.register_worker(Disk, Disk, worker, 2)
    manager.register_worker(Disk, Disk, worker, np.int64(1))


def test_as_many_threads_run_as_were_asked_for(manager):
    together = threading.Barrier(3)
    manager.register_worker(
        Disk, Disk, lambda src, dst: together.wait(10) >= 0, num_threads=np.int32(3)
    )
    jobs = [manager.transfer_async(Disk(), Disk()) for _ in range(3)]
    assert all(result.success for result in finish(manager, *jobs))


def test_a_worker_belongs_to_one_manager_and_may_move_several_kinds(manager):
    shared, other = FunctionWorker(lambda src, dst: 8), OffloadingQueueManager()
    manager.register_worker(Disk, CPULoadStoreSpec, shared)
    manager.register_worker(CPULoadStoreSpec, Disk, shared)
    with pytest.raises(ValueError, match="worker: expected one that no other queue manager has"):
        other.register_worker(Disk, Disk, shared)
    with pytest.raises(ValueError, match="registered worker, got Disk to Disk"):
        other.transfer_async(Disk(), Disk())
    jobs = [
        manager.transfer_async(Disk(), CPULoadStoreSpec([1])),
        manager.transfer_async(CPULoadStoreSpec([1]), Disk()),
    ]
    assert [result.job_id for result in finish(manager, *jobs)] == jobs


def test_two_jobs_under_way_have_two_ids(world, gate):
    function = FunctionWorker(lambda src, dst: gate.wait(60))
    function.transfer_async(7, Disk(), Disk())
    with pytest.raises(ValueError, match="job_id: expected one that no job under way has, got 7"):
        function.transfer_async(7, Disk(), Disk())
    gate.set()
    function.wait([7], 20)
    assert [result.job_id for result in function.get_finished()] == [7]
    function.shutdown(60)
    device_worker = world.queue._worker_for(GPULoadStoreSpec, CPULoadStoreSpec)
    specs = GPULoadStoreSpec([1]), CPULoadStoreSpec([1])
    device_worker.transfer_async(99, *specs)
    with pytest.raises(ValueError, match="got 99"):
        device_worker.transfer_async(99, *specs)
    device_worker.wait([99], 20)
    assert [result.job_id for result in device_worker.get_finished()] == [99]


# -- who moves which specs --


def test_a_spec_of_a_subclass_finds_its_worker(manager):
    class Left(Disk):
        pass

    class Right(Disk):
        pass

    class Both(Left, Right):
        pass

    moved = []

    def register(src, dst):
        name = f"{src.__name__} {dst.__name__}"
        manager.register_worker(src, dst, lambda a, b: moved.append(name))

    def by(src, dst) -> str:
        (result,) = finish(manager, manager.transfer_async(src(), dst()))
        assert result.success
        return moved.pop()

    with pytest.raises(ValueError, match="got Both to Tape"):
        manager.transfer_async(Both(), Tape())
    register(LoadStoreSpec, LoadStoreSpec)
    assert by(Both, Tape) == "LoadStoreSpec LoadStoreSpec"
    register(Disk, Disk)
    assert by(Both, Tape) == "Disk Disk"
    register(LoadStoreSpec, Tape)
    assert by(Both, Tape) == "Disk Disk"  # the source decides first
    register(Disk, Tape)
    assert by(Both, Tape) == "Disk Tape"  # then the destination
    assert by(Both, Disk) == "Disk Disk"
    register(Right, Disk)
    assert by(Both, Tape) == "Right Disk"
    register(Left, Disk)
    assert by(Both, Tape) == "Left Disk"  # the first of its bases
    register(Both, Tape)  # one that is registered late is found by later jobs
    assert by(Both, Tape) == "Both Tape"
    assert by(Right, Tape) == "Right Disk"
    assert by(GPULoadStoreSpec.__base__, Disk) == "LoadStoreSpec LoadStoreSpec"


class MyPages(GPULoadStoreSpec):
    """Pages, and who asked for them."""

    def __init__(self, block_ids, who) -> None:
        super().__init__(block_ids)
        object.__setattr__(self, "who", who)


class MySlots(CPULoadStoreSpec):
    pass


def test_pages_and_slots_of_subclasses_are_moved(world):
    pages = world.tensors[0].clone()
    stored = world.queue.transfer_async(MyPages([1, 2], "me"), MySlots([5, 4], fresh=True))
    (result,) = world.finish(stored)
    assert (result.success, result.num_bytes) == (True, 128)
    assert torch.equal(world.pool.slots[[5, 4]], pages[[1, 2]])
    assert bool((world.pool.slots[6] == POISON).all())
    (result,) = world.finish(world.queue.transfer_async(MySlots([4, 5]), MyPages([8, 9], "me")))
    assert result.success
    pages[[8, 9]] = pages[[2, 1]]
    assert torch.equal(world.tensors[0], pages)
    world.queue._check()


# -- waiting, cancelling, results --


@pytest.fixture
def blocked_and_done(world, device):
    """Two jobs of one worker, of which the first does not end until the event is set."""
    assert world.finish(store(world, [0, 1]))[0].success
    computing, stream = threading.Event(), device.new_stream("engine")
    stream.put(lambda: computing.wait(60))
    slots, pages = CPULoadStoreSpec([0]), GPULoadStoreSpec
    blocked = world.queue.transfer_async(slots, pages([8]), stream=stream)
    done = world.queue.transfer_async(slots, pages([9]), expedited=True)
    world.queue.wait([done], 20)
    yield blocked, done, computing
    computing.set()
    device.close_stream(stream)


@pytest.mark.parametrize("last", ["blocked", "done"])
def test_a_wait_is_for_each_of_the_ids_of_a_device_worker(world, blocked_and_done, last):
    blocked, done, computing = blocked_and_done
    ids = [done, blocked] if last == "blocked" else [blocked, done]
    with pytest.raises(TimeoutError):
        world.queue.wait(ids, 0.05)
    computing.set()
    world.queue.wait(ids, 20)
    assert sorted(result.job_id for result in world.queue.get_finished()) == sorted(ids)


@pytest.mark.parametrize("last", ["blocked", "done"])
def test_a_wait_is_for_each_of_the_ids_of_a_function_worker(manager, last, gate):
    ended = threading.Event()

    def move(src, dst):
        if isinstance(src, Tape):
            assert gate.wait(60)
        else:
            ended.set()

    manager.register_worker(Disk, Disk, move, num_threads=2)
    blocked, done = (manager.transfer_async(spec, Disk()) for spec in (Tape(), Disk()))
    manager.wait([done], 20)
    assert ended.is_set()
    ids = [done, blocked] if last == "blocked" else [blocked, done]
    with pytest.raises(TimeoutError, match=f"job {blocked} was not done within"):
        manager.wait(ids, 0.02)
    gate.set()
    assert [result.job_id for result in finish(manager, *ids)] == sorted(ids)


class Stub(OffloadingWorker):
    """Notes what it is asked, and fails where told to."""

    def __init__(self) -> None:
        self.calls = []
        self.errors = {}

    def _note(self, name, *args):
        self.calls.append((name, *args))
        if self.errors.get(name):
            raise self.errors[name].pop()

    def transfer_async(self, job_id, src, dst, *, expedited=False, stream=None):
        self._note("transfer_async", job_id)

    def get_finished(self):
        self._note("get_finished")
        return []

    def wait(self, job_ids, timeout=None):
        self._note("wait", list(job_ids), timeout)

    def cancel(self, job_ids):
        self._note("cancel", list(job_ids))
        return set()

    def shutdown(self, timeout=None):
        self._note("shutdown", timeout)


@dataclass
class EqualStub(Stub):
    """One that compares by value, and so has no hash."""

    name: str = ""

    def __post_init__(self) -> None:
        super().__init__()


class Clock:
    """A second passes at every look."""

    TIMEOUT_MAX = threading.TIMEOUT_MAX

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now


def three(manager):
    workers = [EqualStub(), EqualStub(), EqualStub()]
    kinds = [(Disk, Disk), (Disk, CPULoadStoreSpec), (CPULoadStoreSpec, Disk)]
    for (src, dst), worker in zip(kinds, workers, strict=True):
        manager.register_worker(src, dst, worker)
    slots = CPULoadStoreSpec([1])
    return workers, [
        manager.transfer_async(src, dst)
        for src, dst in [(Disk(), Disk()), (Disk(), slots), (slots, Disk())]
    ]


def test_one_deadline_holds_for_all_workers(manager, monkeypatch):
    workers, jobs = three(manager)
    with monkeypatch.context() as patch:
        patch.setattr(worker_module, "time", Clock())
        manager.wait(jobs, 2.5)
        assert [w.calls[-1] for w in workers] == [
            ("wait", [job], left) for job, left in zip(jobs, [1.5, 0.5, 0.0], strict=True)
        ]
        manager.wait(jobs)
        manager.wait(jobs, float("inf"))
        assert all(w.calls[-1][-1] is None for w in workers)
        manager.shutdown(2.5)
    assert [w.calls[-1] for w in workers] == [("shutdown", left) for left in (1.5, 0.5, 0.0)]


def test_one_deadline_holds_for_all_jobs_of_a_worker(world, device, blocked_and_done, monkeypatch):
    blocked, done, computing = blocked_and_done
    loads = world.queue._worker_for(CPULoadStoreSpec, GPULoadStoreSpec)
    lefts, clock = [], Clock()
    with monkeypatch.context() as patch:
        patch.setattr(device, "monotonic", clock.monotonic)
        patch.setattr(loads._pipeline, "wait", lambda job, left: lefts.append(left))
        loads.wait([blocked, done, blocked], 2.5)
    assert lefts == [1.5, 0.5, 0.0]
    computing.set()
    world.finish(blocked)


def test_one_deadline_holds_for_all_jobs_of_a_function(manager, monkeypatch, gate):
    manager.register_worker(Disk, Disk, lambda src, dst: gate.wait(60))
    jobs = [manager.transfer_async(Disk(), Disk()) for _ in range(3)]
    worker = manager._worker_for(Disk, Disk)
    lefts = []

    class Ended:
        def wait(self, left):
            lefts.append(left)
            return True

        def set(self):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(worker_module, "time", Clock())
        for job in worker._jobs.values():
            patch.setattr(job, "ended", Ended())
        worker.wait(jobs, 2.5)
    assert lefts == [1.5, 0.5, 0.0]
    gate.set()
    assert [result.job_id for result in finish(manager, *jobs)] == jobs


@pytest.mark.parametrize(
    "as_ids",
    [
        iter,
        lambda ids: (i for i in ids),
        np.array,
        torch.tensor,
        lambda ids: [*ids, *ids],
        lambda ids: {np.int64(i) for i in ids},
        lambda ids: [10**20, *ids, 0, -1],
    ],
)
def test_ids_are_any_integers_known_or_not(manager, as_ids, gate):
    manager.register_worker(Disk, Disk, lambda src, dst: gate.wait(60))
    manager.register_worker(Disk, CPULoadStoreSpec, lambda src, dst: gate.wait(60))
    jobs = [manager.transfer_async(Disk(), Disk()) for _ in range(3)]
    jobs.append(manager.transfer_async(Disk(), CPULoadStoreSpec([1])))
    with pytest.raises(TimeoutError):
        manager.wait(as_ids(jobs), 0.02)
    taken = manager.cancel(as_ids(jobs))
    assert set(jobs[1:3]) <= taken <= set(jobs)
    assert all(type(i) is int for i in taken)
    assert manager.cancel(as_ids(jobs)) <= set(jobs) - taken
    gate.set()
    manager.wait(as_ids(jobs), 20)
    assert [result.job_id for result in finish(manager)] == jobs
    manager.wait(as_ids(jobs))


def test_each_worker_is_asked_once_for_each_of_its_jobs(manager):
    workers, jobs = three(manager)
    more = manager.transfer_async(Disk(), Disk())
    ids = [jobs[2], more, jobs[0], more, 999, jobs[2]]
    manager.wait(iter(ids))
    manager.cancel(iter(ids))
    assert workers[0].calls[2:] == [("wait", [more, jobs[0]], None), ("cancel", [more, jobs[0]])]
    assert workers[1].calls[1:] == []
    assert workers[2].calls[1:] == [("wait", [jobs[2]], None), ("cancel", [jobs[2]])]


@pytest.mark.parametrize("bad", [5, None, ["a"], [1.0], [[1]], "12"])
def test_what_is_no_id_is_refused(manager, bad):
    for call in (manager.wait, manager.cancel):
        with pytest.raises(TypeError, match="job_ids: expected an iterable of integers, got"):
            call(bad)


def test_ids_may_be_made_by_calls_of_the_manager(manager):
    """They are asked for before anything is locked."""
    manager.register_worker(Disk, Disk, move_nothing)
    done = []

    def submit_and_look():
        for _ in range(3):
            job = manager.transfer_async(Disk(), Disk())
            done.extend(manager.get_finished())
            yield job

    manager.wait(submit_and_look(), 20)
    done.extend(manager.get_finished())
    assert len(done) == 3


def test_a_refused_job_leaves_nothing(world, monkeypatch):
    def register(src, dst):
        raise AssertionError("never called")

    world.queue.register_worker(Disk, Disk, register)
    world.queue.register_worker(Disk, CPULoadStoreSpec, register)
    stub = Stub()
    world.queue.register_worker(CPULoadStoreSpec, Disk, stub)
    stub.errors["transfer_async"] = [OSError("refused")]

    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for src, dst, error in [
        (GPULoadStoreSpec([99]), CPULoadStoreSpec([0]), ValueError),
        (CPULoadStoreSpec([0]), GPULoadStoreSpec([99]), ValueError),
        (Disk(), Disk(), RuntimeError),
        (Disk(), CPULoadStoreSpec([0]), RuntimeError),
        (CPULoadStoreSpec([0]), Disk(), OSError),
    ]:
        with pytest.raises(error):
            world.queue.transfer_async(src, dst)
    monkeypatch.undo()
    assert not world.queue._worker_of
    for worker in world.queue._distinct:
        assert not getattr(worker, "_jobs", ())
    assert not world.queue._order._slots
    world.queue._check()
    assert world.queue.get_finished() == []
    (result,) = world.finish(store(world, [0]))  # of the slot that was refused
    assert result.success


def test_a_job_is_known_before_anybody_can_hear_that_it_ended(world):
    """Where it ends at once, and another thread asks before its submission has returned."""
    worker = world.queue._worker_for(GPULoadStoreSpec, CPULoadStoreSpec)
    other = store(world, [2])  # while there is one to be reported, the pipeline is asked
    submit, heard, errors = worker._pipeline.submit, [], []

    def ask() -> None:
        try:
            heard.extend(world.queue.get_finished())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=ask)

    def submit_and_end(*args, **kwargs):
        job = submit(*args, **kwargs)
        worker._pipeline.wait(job, 20)
        thread.start()
        thread.join(0.1)  # it must not get on; where it does, it loses the result
        return job

    worker._pipeline.submit = submit_and_end
    job = store(world, [1])
    thread.join(60)
    heard.extend(world.queue.get_finished())
    assert not errors
    assert sorted(result.job_id for result in heard) == [other, job]
    world.queue._check()
    assert not world.queue._worker_of


def test_a_submission_that_is_interrupted_loses_no_other_result(world):
    worker = world.queue._worker_for(GPULoadStoreSpec, CPULoadStoreSpec)
    submit = worker._pipeline.submit

    def interrupted(*args, **kwargs):
        submit(*args, **kwargs)
        raise KeyboardInterrupt

    before = store(world, [1])
    worker._pipeline.submit = interrupted
    with pytest.raises(KeyboardInterrupt):
        store(world, [2])
    worker._pipeline.submit = submit
    after = store(world, [3])
    world.queue.wait([before, after], 20)
    assert [result.job_id for result in world.queue.get_finished()] == [before, after]
    world.queue._check()


def test_pages_of_a_functions_job_are_its_own_until_it_has_ended(manager, gate):
    manager.register_worker(GPULoadStoreSpec, Disk, lambda src, dst: gate.wait(60))
    job = manager.transfer_async(GPULoadStoreSpec([1]), Disk())
    assert not manager.source_released(job)
    assert not manager.source_released(np.int64(job))
    followed = threading.Event()

    def follow() -> None:
        manager.wait_on(job, None)
        followed.set()

    thread = threading.Thread(target=follow)
    thread.start()
    assert not followed.wait(0.05)
    gate.set()
    thread.join(60)
    assert followed.is_set()
    assert manager.source_released(job)
    assert len(manager.get_finished()) == 1
    assert manager.source_released(job)
    assert manager.source_released(12345)


def test_results_are_reported_once_whatever_their_worker_raises(manager):
    workers, _ = three(manager)
    result = TransferResult(1, TransferStatus.SUCCESS)
    workers[0].get_finished = [[], [result]].pop
    workers[1].errors["get_finished"] = [OSError("no reports")]
    with pytest.raises(OSError, match="no reports"):
        manager.get_finished()
    other = TransferResult(2, TransferStatus.SUCCESS)
    workers[1].get_finished = lambda: [other]
    assert manager.get_finished() == [result, other]


# -- steps --


def steps(call) -> int:
    """How many bytecode instructions of this package a call takes on its own thread."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if "triton_offload" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return count


def test_no_call_takes_steps_for_jobs_that_are_not_its_own():
    """With 40 unfinished jobs and with 80, on slots of their own and all on one slot."""
    assert steps_with(40) == steps_with(80)


def steps_with(count: int) -> dict[str, int]:
    manager, gate = OffloadingQueueManager(), threading.Event()
    manager.register_worker(CPULoadStoreSpec, Disk, lambda src, dst: gate.wait(60))
    manager.register_worker(Disk, CPULoadStoreSpec, lambda src, dst: gate.wait(60))

    def submit(slot) -> int:
        manager.transfer_async(CPULoadStoreSpec([slot, 0]), Disk())
        return manager.transfer_async(Disk(), CPULoadStoreSpec([slot, 0]))

    def wait_in_vain() -> None:
        with pytest.raises(TimeoutError):
            manager.wait([job], 0.0)

    for slot in range(1, count):
        submit(slot)
    job = submit(count)
    taken = {
        "submit": steps(lambda: submit(count + 1)),
        "get none": steps(manager.get_finished),
        "wait": steps(wait_in_vain),
        "source_released": steps(lambda: manager.source_released(job)),
        "cancel": steps(lambda: manager.cancel([job])),
        "cancel again": steps(lambda: manager.cancel([job])),
        "get one": steps(manager.get_finished),
    }
    gate.set()
    manager.shutdown(60)
    return taken


# -- shutting down --


def test_shutdown_waits_for_a_function_and_tries_again(manager, gate):
    threads = threading.active_count()
    started = threading.Event()

    def hang(src, dst):
        started.set()
        assert gate.wait(60)

    manager.register_worker(Disk, Disk, hang)
    manager.register_worker(CPULoadStoreSpec, Disk, hang)
    jobs = [manager.transfer_async(Disk(), Disk()) for _ in range(3)]
    assert started.wait(60)
    for _ in range(2):
        with pytest.raises(TimeoutError, match="functions still run after"):
            manager.shutdown(0.05)
        with pytest.raises(RuntimeError, match="shut down"):
            manager.transfer_async(Disk(), Disk())
        with pytest.raises(RuntimeError, match="shut down"):
            manager.register_worker(Tape, Disk, hang)
        assert manager.get_finished() == []
        manager.wait(jobs[1:], 60)  # what had not started is cancelled
        with pytest.raises(TimeoutError):
            manager.wait(jobs[:1], 0.0)
        assert threading.active_count() == threads + 1
    gate.set()
    manager.shutdown(60)
    assert threading.active_count() == threads
    manager.shutdown()
    manager.wait(jobs)
    assert not manager._worker_of


def test_shutdown_runs_no_function_that_waits_for_the_device(world, device):
    called = []
    world.queue.register_worker(CPULoadStoreSpec, Disk, lambda src, dst: called.append(src))
    threads = threading.active_count()
    device.gate.clear()
    stored = store(world, [3])
    job = world.queue.transfer_async(CPULoadStoreSpec([3]), Disk())
    assert threading.active_count() == threads + 1  # that waits
    with pytest.raises(TimeoutError):
        world.queue.shutdown(0.05)
    world.queue.wait([job], 60)  # cancelled
    device.gate.set()
    world.queue.shutdown(60)
    world.queue.wait([stored, job])
    assert not called
    assert threading.active_count() < threads


def test_shutdown_waits_no_longer_than_it_may_for_a_job_that_waits(world, device):
    """Its worker alone: joining the thread would take until the device is done."""
    function = FunctionWorker(move_nothing)
    world.queue.register_worker(CPULoadStoreSpec, Disk, function)
    waits, waiting = world.queue._order.waits_for_device, threading.Event()
    wait = waits[0]
    waits[0] = lambda *args, **options: waiting.set() or wait(*args, **options)
    device.gate.clear()
    stored = store(world, [3])
    world.queue.transfer_async(CPULoadStoreSpec([3]), Disk())
    assert waiting.wait(20)  # before, it could still be taken back
    patience = threading.Timer(5, device.gate.set)  # for the test's end, where it is wrong
    patience.start()
    for _ in range(2):
        with pytest.raises(TimeoutError, match="functions still run after"):
            function.shutdown(0.02)
    patience.cancel()
    device.gate.set()
    world.queue.wait([stored], 20)
    function.shutdown(60)


def test_threads_are_gone_when_shutdown_returns(monkeypatch):
    worker = FunctionWorker(move_nothing, 3)
    gate, leaving = threading.Event(), []
    run = worker._run

    def slow_to_leave(job) -> None:
        run(job)
        leaving.append(job)
        gate.wait(0.2)
        leaving.pop()

    worker._run = slow_to_leave
    for job_id in range(3):
        worker.transfer_async(job_id, Disk(), Disk())
    worker.wait(range(3), 20)
    worker.shutdown(60)
    assert not leaving


def test_a_function_cannot_shut_its_own_worker_down(manager):
    manager.register_worker(Disk, Disk, lambda src, dst: manager.shutdown())
    (job,) = [manager.transfer_async(Disk(), Disk())]
    manager.wait([job], 20)
    manager.shutdown(60)
    worker = manager._worker_for(Disk, Disk)
    (result,) = worker.get_finished()
    assert "can't be shut down by its own function" in str(result.error)


@pytest.mark.parametrize("failing", [[0], [1], [2], [0, 1, 2]])
def test_what_one_worker_raises_keeps_no_other_from_being_shut_down(failing):
    threads = threading.active_count()
    manager = OffloadingQueueManager()
    workers = []

    class Failing(FunctionWorker):
        def shutdown(self, timeout=None):
            tried.append(self)
            if self in failures:
                failures.remove(self)
                raise OSError("injected")
            super().shutdown(timeout)

    kinds = [(Disk, Disk), (Disk, CPULoadStoreSpec), (CPULoadStoreSpec, Disk)]
    for src, dst in kinds:
        workers.append(Failing(move_nothing))
        manager.register_worker(src, dst, workers[-1])
    slots = CPULoadStoreSpec([1])
    jobs = [manager.transfer_async(*pair) for pair in [(Disk(), Disk()), (Disk(), slots)]]
    manager.wait(jobs, 20)
    jobs.append(manager.transfer_async(slots, Disk()))
    manager.wait(jobs, 20)
    tried, failures = [], [workers[i] for i in failing for _ in range(2)]
    for _ in range(2):
        with pytest.raises(OSError, match="injected"):
            manager.shutdown(60)
        assert tried == workers  # each was tried, in the order of registration
        tried.clear()
        assert threading.active_count() == threads + len(failing)
    manager.shutdown(60)
    assert threading.active_count() == threads
    manager.shutdown(60)


# -- after a fork --

FORKED = """
import os, sys, threading
sys.path[:0] = {paths!r}
from gated import GatedDevice
from oracle import World, random_pages
from triton_offload.specs import CPULoadStoreSpec, GPULoadStoreSpec, LoadStoreSpec

class Disk(LoadStoreSpec): pass

device = GatedDevice()
world = World.build([random_pages(4, 64, 64, 0, 1)], device=device)
queue, gate = world.queue, threading.Event()
queue.register_worker(Disk, Disk, lambda src, dst: gate.wait(60))
device.gate.clear()
specs = GPULoadStoreSpec([1]), CPULoadStoreSpec([1])
jobs = [queue.transfer_async(*specs), queue.transfer_async(Disk(), Disk())]
calls = [
    lambda: queue.transfer_async(*specs),
    lambda: queue.transfer_async(Disk(), Disk()),
    lambda: queue.register_worker(Disk, CPULoadStoreSpec, print),
    lambda: queue.wait(jobs),
    lambda: queue.wait([]),
    lambda: queue.cancel(jobs),
    lambda: queue.source_released(jobs[0]),
    lambda: queue.wait_on(jobs[1], None),
    lambda: queue.get_finished(),
]

def in_a_child():
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    failed = []
    for number, call in enumerate(calls):
        try:
            call()
        except RuntimeError as error:
            if "queue manager" not in str(error) or "fork" not in str(error):
                failed.append((number, error))
        else:
            failed.append((number, "no error"))
    queue.shutdown()
    queue.shutdown(0)
    print("in the child:", failed, flush=True)
    os._exit(len(failed))

assert in_a_child() == 0
# Once more while another thread, which the child has not, holds every lock.
held, release = threading.Barrier(2), threading.Event()
def hold():
    with queue._lock, queue._order._lock:
        held.wait(60)
        release.wait(60)
holder = threading.Thread(target=hold)
holder.start()
held.wait(60)
assert in_a_child() == 0
release.set()
holder.join()
gate.set()
device.gate.set()
queue.wait(jobs, 60)  # nothing of it has touched the parent's
assert all(result.success for result in queue.get_finished())
world.close()
"""


def test_a_forked_child_is_told_so_and_does_not_hang():
    code = FORKED.format(paths=[path for path in sys.path if path])
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("in the child: []") == 2


# -- transfer_queue --


@pytest.mark.parametrize("bad", [{}, "staged", Path.STAGED, PipelineOptions])
def test_options_of_another_kind_are_refused(world, bad):
    with pytest.raises(TypeError, match="options: expected PipelineOptions, got"):
        transfer_queue(world.layout, world.pool, options=bad)


@pytest.mark.parametrize("bad", ["fast", "", None, 3, ["staged"]])
def test_a_path_that_is_none_is_refused(world, bad):
    with pytest.raises(ValueError, match=r"path: expected one of \['auto', 'staged'"):
        transfer_queue(world.layout, world.pool, path=bad)
    with pytest.raises(ValueError, match="path: expected it in `options`"):
        transfer_queue(world.layout, world.pool, path="staged", options=PipelineOptions())


def test_of_several_jobs_a_function_takes_back_none_together_and_one_alone(manager):
    running, go = threading.Event(), threading.Event()

    def hold(src, dst):
        running.set()
        assert go.wait(60)

    manager.register_worker(Disk, Disk, hold)
    first, *waiting = (manager.transfer_async(Disk(), Disk()) for _ in range(3))
    try:
        assert running.wait(60)
        assert not manager.cancel_together([first])
        assert not manager.cancel_together(waiting)
        assert manager.cancel_together(waiting[:1])
    finally:
        go.set()
    results = {result.job_id: result.status for result in finish(manager, first, *waiting)}
    assert results[first] is results[waiting[1]] is TransferStatus.SUCCESS
    assert results[waiting[0]] is TransferStatus.CANCELLED
