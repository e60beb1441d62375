"""Whatever a device does wrong: only the jobs concerned fail, and nothing is lost, wrong or left.

The calls are those of the seam (`fault_worlds.SEAM`, by introspection), and how often each is made
is counted in a run without faults, so that every injected fault is known to strike.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter

import pytest
from fault_levels import LEVELS, OffloaderWorld, QueueWorld, begun
from fault_worlds import EVERY, SEAM, WAITING, causes

from triton_offload.calibration import Path
from triton_offload.errors import DeviceLostError

NTHS = (1, 2, 5, 13)

# Where a job's end can be marked no more, its lane is lost; one such fault in a row costs a job.
MARKING = {"new_event", "record", "wait"}
# A copy clears slots for every path, so that a path that needs it has none to stand in for it.
WITHOUT_STAND_IN = {"copy"}

levels = pytest.mark.parametrize("level", LEVELS)
paths = pytest.mark.parametrize("path", Path, ids=lambda path: path.value)
calls = pytest.mark.parametrize("call", SEAM)


@functools.cache
def counts(level: str, path: Path, seed: int) -> dict[str, Counter[str]]:
    """How often each call is made in each phase of a run in which nothing fails."""
    world = LEVELS[level](seed, path)
    seen = [Counter(world.calls_before)]
    for step in (
        lambda: (world.open(), world.pool.wait_ready(60)),
        world.begin_stored,
        world.work,
        lambda: (world.work_on(), world.check_pool(), world.check_loads()),
        world.close,
    ):
        step()
        seen.append(Counter(world.device.calls))
    assert not any(job.failed for job in world.jobs)
    assert not world.raised
    world.check_freed()
    world.check_memory_freed()
    made = [after - before for before, after in itertools.pairwise(seen)]
    return {"construction": made[0], "work": made[2], "shutdown": made[4]}


def test_the_scenario_makes_every_call_of_the_seam():
    made: Counter[str] = Counter()
    for level, path in itertools.product(LEVELS, Path):
        for phase in counts(level, path, 1).values():
            made += phase
    missing = set(SEAM) - set(made)
    assert not missing, f"calls of the seam without a fault test: {missing}"


# -- a call that raises --


@pytest.mark.parametrize("call", [call for call in SEAM if call != "register"])  # see below
@levels
def test_a_construction_that_fails_leaves_nothing(call, level):
    path = Path.STAGED
    for nth in range(1, counts(level, path, 1)["construction"][call] + 1):
        world = LEVELS[level](1, path)
        world.arm(call, nth)
        if call in WAITING:  # of whoever waits until the pool is pinned
            world.open()
            world.call("wait", world.pool.wait_ready, 60)
            world.close()
        else:
            world.call("open", world.open)
        assert [error for _, error in world.raised] == [world.injected]
        assert world.device.faults.num_struck == 1
        world.check_freed()


@calls
@paths
@levels
def test_a_call_that_fails_once(call, path, level):
    for nth in NTHS:
        if counts(level, path, nth)["work"][call] < nth:
            continue
        world = begun(level, nth, path)
        world.arm(call, nth)
        world.work()
        assert world.device.faults.num_struck == 1
        world.check_failures(call)
        assert len(world.failed) + len(world.raised) <= 1
        assert not world.failed or call in MARKING - {"wait"}
        assert all(job.result.success for job in world.work_on())
        world.check_end()
        world.check_memory_freed()


@calls
@paths
@levels
def test_a_call_that_fails_from_then_on(call, path, level):
    for nth in (1, 3):
        if counts(level, path, nth)["work"][call] < nth:
            continue
        world = begun(level, nth, path)
        world.arm(call, nth, EVERY)
        world.work()
        world.check_failures(call)
        assert not world.failed or call in MARKING | WITHOUT_STAND_IN
        world.device.faults.clear()
        lost = [name for name, lane in world.pipeline._lanes.items() if lane.lost]
        assert not lost or call in MARKING
        # A lane that could mark nothing any more says so at once.
        errors = [job.result.error for job in world.work_on() if job.failed]
        assert not errors or lost
        assert all(isinstance(error, DeviceLostError) for error in errors)
        assert all(world.injected in causes(error) for error in errors)
        world.check_end(loads=not lost)
        world.check_memory_freed()


@calls
@levels
@pytest.mark.parametrize("times", [1, EVERY])
def test_a_shutdown_that_fails_frees_what_it_can(call, level, times):
    world = begun(level, 1, Path.STAGED)
    world.work()
    world.store(1, [7])
    world.load(0, [6])
    world.arm(call, 1, times)
    world.call("close", world.close_once, None if times == 1 else 60)
    world.device.faults.clear()
    struck = world.device.faults.num_struck
    streams = struck if call == "close_stream" else 0
    pieces = struck if call == "unregister" else 0
    assert bool(world.raised) == bool(streams or pieces or (call in WAITING and struck))
    if pieces or (isinstance(world, OffloaderWorld) and call not in WAITING):
        world.check_freed(streams=streams, pieces=pieces)  # by one call, where it could wait
    world.close()
    if isinstance(world, QueueWorld):  # what could not be closed is tried again
        streams = 0
    world.check_freed(streams=streams, pieces=pieces)
    world.check_memory_freed()


# -- memory that cannot be pinned --


@levels
@pytest.mark.parametrize("nth", [1, 2, 4])
@pytest.mark.parametrize("raises", [False, True], ids=["refused", "raised"])
def test_a_pool_that_cannot_be_pinned_works_unpinned(level, nth, raises):
    world = LEVELS[level](1, Path.ZERO_COPY)
    if raises:
        world.arm("register", nth)
    else:
        world.device.faults.refuse(nth)
    world.begin()
    assert world.device.faults.num_struck == 1
    assert not world.pool.pinned
    assert world.pool.pin_error is world.injected  # None where it was refused
    assert world.device.num_registered == nth - 1
    world.work()
    world.work_on()
    assert not any(job.failed for job in world.jobs)
    world.check_end()
