"""What is worse than it could be is logged: once, why, and what can be done about it."""

from __future__ import annotations

import logging

import pytest
import torch
from pipelines import PipelineWorld

from triton_offload import KVOffloader, ledger
from triton_offload.calibration import Path
from triton_offload.device.host import HostDevice
from triton_offload.errors import DeviceLostError
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import TransferStatus
from triton_offload.testing import InjectedError, SimulatedDevice
from triton_offload.transfer.pipeline import PipelineOptions

PAGE = 64


def caches() -> list[torch.Tensor]:
    return [torch.full((16, PAGE), i, dtype=torch.uint8) for i in range(2)]


def offloader(device=None, path: str = "staged", **kwargs) -> KVOffloader:
    options = PipelineOptions(path=Path(path), buffer_bytes=1 << 10)
    return KVOffloader(caches(), 16 * 2 * PAGE, device=device, options=options, **kwargs)


def the_warning(caplog, module: str, remedy: str = "`triton-offload doctor`") -> str:
    """The text of the one record that there is."""
    (record,) = caplog.records
    assert (record.name, record.levelno) == (f"triton_offload.{module}", logging.WARNING)
    assert remedy in record.getMessage()
    # What is kept of it keeps no pool, page or frame alive.
    assert all(isinstance(each, str | int) for each in record.args)
    return record.getMessage()


@pytest.mark.parametrize("kind", ["host", "simulated"])
@pytest.mark.parametrize("path", Path, ids=lambda path: path.value)
def test_what_goes_well_is_not_talked_about(caplog, kind, path):
    caplog.set_level(logging.DEBUG, "triton_offload")
    with offloader(None if kind == "host" else SimulatedDevice(1), path.value) as kv:
        kv._pool.wait_ready(60)
        for _ in range(3):
            kv.store([b"a", b"b"], [0, 1]).wait()
            kv.load([b"a", b"b"], [2, 3], expedited=True).wait()
        kv.get_finished()
        kv.stats()
    assert caplog.records == []


# -- pinning --


@pytest.mark.parametrize(
    ("refused", "why"),
    [(True, "the device refuses to pin it"), (False, r"InjectedError('injected: pin')")],
)
def test_a_pool_that_can_not_be_pinned_is_told_of_once_with_what_it_costs(caplog, refused, why):
    device = SimulatedDevice(1)

    def register(host):
        if refused:
            return False
        raise InjectedError("injected: pin")

    device.register = register
    with offloader(device) as kv:
        kv._pool.wait_ready(60)
        for block in range(3):
            kv.store([bytes([block])], [block]).wait()
    text = the_warning(caplog, "pool.preparation")
    assert (
        f"a host pool of {16 * 2 * PAGE} bytes could not be pinned ({why}): copies are slower"
        in text
    )
    assert "zero_copy is not to be had" in text


def test_the_host_device_loses_nothing_by_a_pool_that_is_not_pinned(caplog):
    class Refusing(HostDevice):
        def register(self, host):
            return False

    pool = HostPool.allocate(Refusing(), 4, 64)
    pool.wait_ready(60)
    pool.close()
    assert pool.pin_failure == "the device refuses to pin it"
    assert caplog.records == []


def test_a_pool_that_is_closed_before_it_was_pinned_has_not_failed(caplog):
    device = SimulatedDevice(1)
    pool = HostPool.allocate(device, 4, 64)
    preparation = pool._preparation
    pool.close()
    assert preparation._step() == float("inf")
    assert (pool.pin_failure, caplog.records) == (None, [])


# -- paths --


@pytest.mark.parametrize(
    ("path", "stands_in"),
    [
        (Path.STAGED, "copy_engine"),
        (Path.ZERO_COPY, "copy_engine"),
        (Path.COPY_ENGINE, "staged"),
    ],
    ids=lambda each: each.value if isinstance(each, Path) else "",
)
def test_a_path_that_is_replaced_is_told_of_once_and_not_for_each_job(caplog, path, stands_in):
    world = PipelineWorld.build(SimulatedDevice(1), path=path, buffer_bytes=256)
    lane = world.pipeline._lanes["load"]
    queue = lane.paths.queue

    def refuse(which, *args):
        if which is path:
            raise InjectedError("injected: not queued")
        return queue(which, *args)

    lane.paths.queue = refuse
    for block in range(4):
        job = world.load(range(block, block + 1), range(block, block + 1))
        world.finish(job)
        assert job.result.status is TransferStatus.SUCCESS
    world.close()
    text = the_warning(caplog, "transfer.lane_paths")
    assert text.startswith(
        f"the path {path.value} of the lane load could not be queued "
        f"(InjectedError('injected: not queued')): {stands_in} stands in for it from now on"
    )


def test_where_no_path_is_left_nothing_is_said_to_stand_in(caplog):
    world = PipelineWorld.build(SimulatedDevice(1), path=Path.STAGED, buffer_bytes=256)

    def refuse(*args):
        raise InjectedError("injected: not queued")

    world.pipeline._lanes["store"].paths.queue = refuse
    for block in range(3):
        job = world.store(range(block, block + 1), range(block, block + 1))
        world.finish(job)
        assert isinstance(job.result.error, InjectedError)
    world.close()
    assert "copy_engine stands in" in the_warning(caplog, "transfer.lane_paths")


# -- batches of copies --


def test_a_device_without_batches_of_copies_is_told_of_once(caplog):
    device = SimulatedDevice(1)
    device.batches_copies = False
    with offloader(device) as kv:
        kv._pool.wait_ready(60)
        for block in range(3):
            kv.store([bytes([block])], [block]).wait()
    text = the_warning(caplog, "transfer.queue_manager")
    assert "simulated takes no batches of copies: the path copy_engine is not to be had" in text
    assert "`triton-offload doctor` says why" in text


# -- results that nobody took --


def test_results_that_are_dropped_are_told_of_once_where_somebody_takes_them(caplog, monkeypatch):
    monkeypatch.setattr(ledger, "_MAX_UNREAD", 4)

    def end(kv, count):
        for _ in range(count):
            kv.store([], []).wait()

    with offloader() as kv:
        end(kv, 20)  # a program that only waits
        assert len(kv.get_finished()) == 4
        end(kv, 4)
        assert caplog.records == []  # none of these is lost
        end(kv, 20)
        text = the_warning(caplog, "ledger", "call it more often, or never")
        assert "more than 4 ended since the last call of get_finished" in text
        assert len(kv.get_finished()) == 4
        end(kv, 20)
        the_warning(caplog, "ledger", "call it more often, or never")


# -- a device that is lost --


def test_a_device_that_is_lost_is_told_of_once_whatever_lanes_find_out(caplog):
    device = SimulatedDevice(1)
    world = PipelineWorld.build(device, path=Path.STAGED)
    world.finish(world.store(range(4), range(4)))

    def lose(event):
        raise DeviceLostError("injected: lost")

    device.query = lose
    jobs = [
        world.store(range(4), range(4, 8)),
        world.load(range(8, 12), range(4)),
        world.load(range(12, 16), range(4), expedited=True),
    ]
    world.finish(*jobs)
    assert all(isinstance(job.result.error, DeviceLostError) for job in jobs)
    assert all(lane.lost for lane in world.pipeline._lanes.values())
    text = the_warning(caplog, "transfer.pipeline")
    assert "the device was lost, as the lane store found" in text
    assert "injected: lost" in text
    del device.query
    world.close()
