"""A step whose model computes layer by layer behind a load, in virtual time: predictions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from triton_offload.calibration import Path
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import CPULoadStoreSpec, GPULoadStoreSpec
from triton_offload.testing.simulated import Rates, SimulatedDevice
from triton_offload.transfer.layers import Layers
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.options import PipelineOptions
from triton_offload.transfer.queue_manager import transfer_queue

#: copies of PCIe Gen5 x16, scatters by 16 CTAs, and 40 us of a caller for a segment of ten calls
H100 = Rates(link=55e9, kernel=450e9, call=4e-6)
NUM_LAYERS = 80
PAGE_BYTES = 32 << 10  # 16 tokens of 8 heads of 128, in 16 bits


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds: of the load alone, of compute alone, and, from the submission of the load on, until
    the first layer starts and until the last one has ended."""

    load: float
    compute: float
    first: float
    end: float

    @property
    def first_share(self) -> float:
        """When the first layer starts, of the load's time."""
        return self.first / self.load

    @property
    def over(self) -> float:
        """The step's end, over the longer of load and compute."""
        return self.end / max(self.load, self.compute)


class Prefill:
    """A model of 80 layers, K and V each, whose pages of `num_bytes` in all are in the pool; blocks
    of the device are in no order."""

    def __init__(self, num_bytes: int, path: Path) -> None:
        count = num_bytes // (2 * NUM_LAYERS * PAGE_BYTES)
        self._device = device = SimulatedDevice(timing_only=True, rates=H100)
        caches = [device.empty(count * PAGE_BYTES).view(count, -1) for _ in range(2 * NUM_LAYERS)]
        layout = CacheLayout(caches)
        rows = torch.empty(count, layout.slot_bytes, dtype=torch.uint8)
        device.register(rows)
        pool = HostPool.from_tensor(device, rows, pinned=True)
        self._layers = Layers(layout, [[2 * i, 2 * i + 1] for i in range(NUM_LAYERS)])
        self._queue = transfer_queue(layout, pool, options=PipelineOptions(path=path))
        self._slots = CPULoadStoreSpec(range(count))
        self._pages = GPULoadStoreSpec(np.random.default_rng(0).permutation(count))

    def step(self, *, by_layers: bool, layer_seconds: float | None = None) -> Step:
        """`layer_seconds`: of a layer's kernels; None: all layers take as long as the load."""
        load = self._load_alone()
        seconds = load / NUM_LAYERS if layer_seconds is None else layer_seconds
        start = self._device.monotonic()
        compute = self._compute(seconds, None, by_layers=False)[0] - start
        start = self._device.monotonic()
        job = self._submit(by_layers=by_layers)
        end, first = self._compute(seconds, job, by_layers=by_layers)
        self._queue.wait([job])
        return Step(load, compute, first - start, end - start)

    def close(self) -> None:
        self._queue.shutdown()

    def _load_alone(self) -> float:
        for by_layers in (True, False):  # the first prepares what loads by layers need
            start = self._device.monotonic()
            self._queue.wait([self._submit(by_layers=by_layers)])
        return self._device.monotonic() - start

    def _submit(self, *, by_layers: bool) -> int:
        layers = self._layers if by_layers else None
        return self._queue.transfer_async(self._slots, self._pages, layers=layers)

    def _compute(self, seconds: float, job: int | None, *, by_layers: bool) -> tuple[float, float]:
        """When the last layer ends, and when the first one starts."""
        device = self._device
        stream = device.compute_stream
        if job is not None and not by_layers:
            self._queue.wait_on(job, stream)
        kernels = []
        for layer in range(NUM_LAYERS):
            if job is not None and by_layers:
                self._queue.wait_on(job, stream, layer)
            kernels.append(device.launch(f"layer {layer}", stream, seconds=seconds))
        computed = device.new_event()
        device.record(computed, stream)
        device.synchronize(computed, None)
        return kernels[-1].end, kernels[0].start
