"""The benchmarks' GPU branches where CUDA is imitated, with hardly anything to move.

    PYTHONPATH=tests:bench:. python -m pytest -p imitation_bench bench/test_transfers.py

Every line runs, and bytes are checked as always; the figures mean nothing. What `imitation_cuda`
has no need of is added here: an event that is not reached at once, a driver's library, a card's
properties. vLLM is not looked for.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from types import SimpleNamespace
from typing import Any

import torch
from cuda.bindings import runtime

from triton_offload.device import host

RealHostDevice = host.HostDevice  # before it is replaced

from imitation_cuda import CARD, CPU, Event, checked_by, in_cpu_memory  # noqa: E402

from triton_offload.device.cuda import CUDADevice  # noqa: E402

sys.modules["vllm"] = None  # type: ignore[assignment]  # an import of it is refused

PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3 (imitation)",
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65_536,
    total_memory=80 << 30,
    memory_clock_rate=2_619_000,
    memory_bus_width=5120,
)


class HostDevice(RealHostDevice):
    """Where tensors are asked for their device: the card. A subclass is what it says."""

    def __new__(cls) -> Any:
        return CUDADevice(CARD) if cls is HostDevice else super().__new__(cls)


class LateEvent(Event):
    """Reached when the main thread has asked three times or waited, so that something is under
    way for as long as it takes to see that, whatever other threads ask."""

    def __init__(self, enable_timing: bool = False) -> None:
        super().__init__(enable_timing)
        self._asked = 0

    def record(self, stream: Any = None) -> None:
        super().record(stream)
        self._asked = 0

    def query(self) -> bool:
        if threading.current_thread() is threading.main_thread():
            self._asked += 1
        return self._asked > 2

    def synchronize(self) -> None:
        self._asked = 3


class Library:
    """`libcuda.so.1`, as far as a benchmark calls it itself."""

    def cuMemcpyBatchAsync_v2(  # noqa: N802
        self, dst: Any, src: Any, sizes: Any, count: Any, attributes: Any, *rest: Any
    ) -> int:
        dsts, srcs, lengths = (
            (ctypes.c_uint64 * count.value).from_address(array.value) for array in (dst, src, sizes)
        )
        assert attributes.value
        assert len(rest) == 3  # where attributes begin, how many there are, the stream
        for to, source, size in zip(dsts, srcs, lengths, strict=True):
            ctypes.memmove(to, source, size)
        return 0


def copy(dst: int, src: int, size: int, kind: Any, stream: int) -> None:
    ctypes.memmove(dst, src, size)


def imitate() -> None:
    host.HostDevice = HostDevice  # type: ignore[misc]
    torch.cuda.get_device_properties = lambda index: PROPERTIES
    torch.cuda.empty_cache = lambda: None
    torch.cuda.Event = LateEvent
    torch.ones = in_cpu_memory(torch.ones)
    runtime.cudaMemcpyAsync = checked_by(runtime.cudaMemcpyAsync, copy)
    import sizes

    assert sizes.HAS_GPU, "imitation_cuda comes first"
    sizes.SIZES = sizes.TINY
    import timing

    timing.DEVICE = CPU  # tensors "on the card" are CPU tensors in truth
    import contenders

    contenders.driver_library = Library
    # Small products of bfloat16 take seconds by the library that is made for large ones.
    torch.backends.mkldnn.enabled = False
    torch.set_num_threads(1)


imitate()
