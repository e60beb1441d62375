"""How long things take in a simulation of virtual time alone: predictions, not measurements."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from triton_offload.calibration import Path
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import CPULoadStoreSpec, GPULoadStoreSpec
from triton_offload.testing import SimulatedDevice
from triton_offload.testing.prefill import Prefill
from triton_offload.testing.simulated import Rates
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.pipeline import PipelineOptions
from triton_offload.transfer.queue_manager import transfer_queue
from triton_offload.transfer.ranges import SLICE_BYTES

PAGE_BYTES = 8 << 10
TENSORS = 32
SMALL_BYTES = 4 << 10

ROUND = Rates()
# An H100 on PCIe Gen5 x16, and 16 CTAs that gather. Of the ten calls of a segment each takes what
# Python and the driver take between two of them: a segment costs its caller 40 us.
H100 = Rates(link=55e9, kernel=450e9, call=4e-6)


class Engine:
    """Decodes in small kernels, and copies 4 KiB on a stream of its own every 0.3 ms."""

    def __init__(self, device: SimulatedDevice, direction: str) -> None:
        host = torch.empty(SMALL_BYTES, dtype=torch.uint8)
        device.register(host)
        pair = device.empty(SMALL_BYTES), host
        self._device = device
        self._pair = pair if direction == "load" else pair[::-1]
        self._copies = device.new_stream("engine copies")
        self._small: list = []
        self._task = device.background("engine", self._step)

    def _step(self) -> float:
        self._device.launch("decode", self._device.compute_stream, seconds=50e-6)
        self._device.copy(*self._pair, self._copies)
        self._small.append(self._copies.last)
        return 300e-6

    def stop(self) -> list[float]:
        """How long each of its copies waited, in seconds."""
        self._task.stop()
        self._device.drain()
        return [copy.start - copy.submitted for copy in self._small]


def run_job(
    direction: str,
    num_bytes: int,
    *,
    in_turn: bool = True,
    window_bytes: int | None = None,
    beside: bool = False,
    rates: Rates = ROUND,
) -> tuple[float, dict[str, float], list[float]]:
    """(seconds of the job, seconds that each stage was busy, waits of the engine's copies)."""
    device = SimulatedDevice(0, timing_only=True, in_turn=in_turn, rates=rates)
    count = num_bytes // (TENSORS * PAGE_BYTES)
    caches = [device.empty(count * PAGE_BYTES).view(count, PAGE_BYTES) for _ in range(TENSORS)]
    layout = CacheLayout(caches)
    rows = torch.empty(count, layout.slot_bytes, dtype=torch.uint8)
    device.register(rows)
    options = PipelineOptions(path=Path.STAGED, window_bytes=window_bytes)
    pool = HostPool.from_tensor(device, rows, pinned=True)
    queue = transfer_queue(layout, pool, options=options)
    engine = Engine(device, direction) if beside else None
    copies = device.to_device if direction == "load" else device.to_host
    before = copies.busy
    pages = GPULoadStoreSpec(np.random.default_rng(0).permutation(count))
    slots = CPULoadStoreSpec(np.arange(count), fresh=True)
    start = device.monotonic()
    job = queue.transfer_async(*((slots, pages) if direction == "load" else (pages, slots)))
    queue.wait([job])
    seconds = device.monotonic() - start
    (result,) = queue.get_finished()
    assert result.success
    assert result.num_bytes == num_bytes
    stages = {
        "copy": copies.busy - before,
        "kernel": num_bytes / device.rates.kernel,
    }
    waits = engine.stop() if engine else []
    queue.shutdown()
    return seconds, stages, waits


@pytest.mark.parametrize("direction", ["store", "load"])
@pytest.mark.parametrize("num_bytes", [65 << 20, 256 << 20, 4 << 30], ids=lambda n: f"{n >> 20}MiB")
def test_a_job_takes_little_more_than_its_longest_stage(direction, num_bytes):
    num_bytes -= num_bytes % (TENSORS * PAGE_BYTES)
    seconds, stages, _ = run_job(direction, num_bytes)
    assert seconds >= max(stages.values())
    assert seconds <= 1.05 * max(stages.values())


def plain_copy(direction: str, num_bytes: int, rates: Rates) -> float:
    """Seconds of one copy of so many bytes that lie together, until the host knows of its end."""
    device = SimulatedDevice(0, timing_only=True, rates=rates)
    host = torch.empty(num_bytes, dtype=torch.uint8)
    device.register(host)
    pair = device.empty(num_bytes), host
    stream, done = device.new_stream("plain"), device.new_event()
    start = device.monotonic()
    device.copy(*(pair if direction == "load" else pair[::-1]), stream)
    device.record(done, stream)
    device.synchronize(done, None)
    return device.monotonic() - start


@pytest.mark.parametrize("direction", ["store", "load"])
@pytest.mark.parametrize(("mebibytes", "least"), [(16, 0.85), (64, 0.95), (512, 0.98)])
def test_a_job_comes_near_one_plain_copy(mebibytes, least, direction):
    seconds, _, _ = run_job(direction, mebibytes << 20, rates=H100)
    plain = plain_copy(direction, mebibytes << 20, H100)
    assert least <= plain / seconds < 1


@pytest.mark.parametrize("direction", ["store", "load"])
def test_a_small_copy_waits_for_two_slices_where_streams_are_served_in_turn(direction):
    _, _, waits = run_job(direction, 4 << 30, beside=True)
    slice_seconds = SLICE_BYTES / 55e9
    assert len(waits) > 200
    assert max(waits) > 0.5 * slice_seconds  # it does meet the burst
    assert max(waits) <= 2 * slice_seconds


@pytest.mark.parametrize("direction", ["store", "load"])
def test_a_window_bounds_the_wait_where_the_engine_serves_first_in_first_out(direction):
    window = 32 << 20
    _, _, unbounded = run_job(direction, 4 << 30, in_turn=False, beside=True)
    _, _, bounded = run_job(direction, 4 << 30, in_turn=False, window_bytes=window, beside=True)
    slack = 20e-6  # each copy's launch
    assert max(unbounded) > 10 * window / 55e9
    assert max(bounded) <= window / 55e9 + slack


@pytest.mark.parametrize("path", Path)
@pytest.mark.parametrize("mebibytes", [64, 256])
def test_a_model_computes_its_layers_while_they_come(mebibytes, path):
    """A load of 80 layers beside a prefill of the same length."""
    prefill = Prefill(mebibytes << 20, path)
    whole, layered = prefill.step(by_layers=False), prefill.step(by_layers=True)
    prefill.close()
    assert whole.first_share >= 0.99
    assert whole.end >= 0.99 * (whole.load + whole.compute), "without layers, they add up"
    assert layered.first_share <= 0.05
    assert layered.over <= 1.10


@pytest.mark.parametrize("speed", [0.25, 4])
def test_layers_come_in_time_for_a_slower_model_and_a_faster_one(speed):
    """The longer of the two decides: what is hidden of the other is all but its first band, or its
    last."""
    prefill = Prefill(256 << 20, Path.STAGED)
    load = prefill.step(by_layers=True).load
    step = prefill.step(by_layers=True, layer_seconds=load / 80 / speed)
    prefill.close()
    assert step.first_share <= 0.05
    assert step.over <= 1.05
