"""CUDA in name only: tensors lie in CPU memory, and what is queued on a stream is done at once.

    PYTHONPATH=tests python -m pytest -p imitation_cuda tests/test_cuda.py

With this plugin, what calls torch.cuda and cuda-bindings runs where there is no GPU, and must call
them with arguments of the right number and kind; cuda-bindings itself checks its own, and finds no
driver after that. It says nothing of order (`triton_offload.testing` does), of the kernels
(Triton's interpreter does; their place is taken by the host device's copies), nor of speed.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from cuda.bindings import driver, runtime

assert not torch.cuda.is_available(), "there is a GPU here: nothing needs to be imitated"

CARD = torch.device("cuda", 0)
CPU = torch.device("cpu")

#: what `with torch.cuda.device` has set, the innermost last; a thread begins with another card
cuda_devices = [torch.device("cuda", 1)]
#: the keywords of tensors made in pinned memory
pinned: list[dict[str, Any]] = []
#: (function, stream) of what cuda-bindings was asked for
asked: list[tuple[str, int]] = []


class Stream:
    _numbers = itertools.count(1)

    def __init__(self, device: torch.device = CARD, priority: int = 0) -> None:
        assert device == CARD
        assert priority in (0, -1)
        self.device = device
        self.priority = priority
        self.cuda_stream = next(self._numbers)
        self.num_synchronized = 0

    def synchronize(self) -> None:
        self.num_synchronized += 1

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event)


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self._timed = enable_timing
        self._recorded: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        assert stream is None or isinstance(stream, Stream)
        self._recorded = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        """In milliseconds; torch refuses events without timing, and those not recorded."""
        assert self._timed
        assert end._timed
        assert self._recorded is not None
        assert end._recorded is not None
        return (end._recorded - self._recorded) * 1e3


class Graph: ...


class Runtime:
    """What `torch.cuda.cudart()` returns."""

    def __init__(self) -> None:
        self._registered: dict[int, int] = {}  # bytes by address
        self.refuses = False

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802
        assert address not in self._registered
        assert num_bytes > 0
        assert flags == 0x3  # portable and mapped
        assert cuda_devices[-1] == CARD
        if self.refuses:
            return 2  # no memory
        self._registered[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        assert cuda_devices[-1] == CARD
        del self._registered[address]
        return 0


class Cuda:
    """What stands for functions of `torch.cuda`."""

    def __init__(self) -> None:
        self._runtime = Runtime()
        self._streams = [Stream()]  # the innermost last
        self._capturing = False

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: torch.device) -> str:
        return "imitation"

    def synchronize(self) -> None: ...

    def _sleep(self, cycles: int) -> None: ...

    def current_stream(self, device: torch.device = CARD) -> Stream:
        assert device in (CARD, CPU)  # whose tensors lie there, in truth
        return self._streams[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        assert isinstance(stream, Stream)
        self._streams.append(stream)
        try:
            yield
        finally:
            self._streams.pop()

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        assert device == CARD
        cuda_devices.append(device)
        try:
            yield
        finally:
            cuda_devices.pop()

    def cudart(self) -> Runtime:
        return self._runtime

    def is_current_stream_capturing(self) -> bool:
        return self._capturing

    @contextmanager
    def graph(self, graph: Graph) -> Iterator[None]:
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False


def checked_by(original: Callable[..., Any], carry_out: Callable[..., Any]) -> Callable[..., Any]:
    """cuda-bindings' own function looks at the arguments, and then finds no driver."""

    def call(*args: Any) -> tuple[int]:
        try:
            error, *_ = original(*args)
        except RuntimeError:  # no driver at all; a TypeError is for the caller
            pass
        else:  # of the runtime, or of a driver that has no card
            assert int(error) != 0, "something was there and took it: it would be done twice"
        carry_out(*args)
        return (0,)

    return call


def copy_batch(
    dst: Any, src: Any, sizes: Any, count: int, attributes: Any, _: Any, __: int, stream: int
) -> None:
    asked.append(("batch", stream))
    assert len(dst) == len(src) == len(sizes) == count
    (each,) = attributes
    in_stream_order = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
    assert each.srcAccessOrder == in_stream_order
    for to, source, size in zip(dst, src, sizes, strict=True):
        ctypes.memmove(int(to), int(source), size)


def copy_rows(
    dst: int, dst_pitch: int, src: int, src_pitch: int, width: int, rows: int, _: Any, stream: int
) -> None:
    asked.append(("rows", stream))
    assert min(dst_pitch, src_pitch) >= width
    for row in range(rows):
        ctypes.memmove(dst + row * dst_pitch, src + row * src_pitch, width)


def in_cpu_memory(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def call(*args: Any, **options: Any) -> torch.Tensor:
        if torch.device(options.get("device") or CPU).type == "cuda":
            options["device"] = CPU
        if options.pop("pin_memory", None):
            pinned.append(options)
        return make(*args, **options)

    return call


def imitate() -> None:
    cuda = Cuda()
    for name in (name for name in dir(cuda) if not name.startswith("__")):
        if callable(getattr(cuda, name)):
            setattr(torch.cuda, name, getattr(cuda, name))
    torch.cuda.Stream, torch.cuda.Event, torch.cuda.CUDAGraph = Stream, Event, Graph
    for name in ("empty", "zeros", "full"):
        setattr(torch, name, in_cpu_memory(getattr(torch, name)))
    torch.Tensor.cuda = torch.Tensor.clone
    torch.Tensor.pin_memory = torch.Tensor.clone
    torch.Tensor.is_pinned = lambda self: True
    driver.cuMemcpyBatchAsync = checked_by(driver.cuMemcpyBatchAsync, copy_batch)
    runtime.cudaMemcpy2DAsync = checked_by(runtime.cudaMemcpy2DAsync, copy_rows)

    from triton_offload.device import host, host_pages
    from triton_offload.device.cuda import CUDADevice
    from triton_offload.kernels import compiling, pages

    def launch(
        kernel: Any, table: Any, blocks: Any, slots: Any, ids: Any, first: int, _: Any
    ) -> None:
        move = host_pages.gather if kernel is pages._gather_kernel else host_pages.scatter
        move(table, blocks, slots, ids, first)

    pages._launch = launch
    pages._check_table = lambda table: None
    pages.prepare = lambda table, alignment, config: None
    compiling.backend_of = lambda kernel, device: "cuda"
    # Tensors "on the card" are CPU tensors in truth, whose device is the host's.
    host.HostDevice = lambda: CUDADevice(CARD)


imitate()
