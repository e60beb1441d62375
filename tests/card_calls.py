"""Calls of the imitated driver's entry points as C programs make them, for tests of its rules."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

from card.card import CONFIGURATIONS, Card, Configuration, build_library

# The errors' numbers, by their names in cuda.h.
INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED = 1, 2, 3
INVALID_CONTEXT, INVALID_HANDLE, NOT_FOUND, NOT_READY = 201, 400, 500, 600
ILLEGAL_ADDRESS, ALREADY_REGISTERED, NOT_REGISTERED = 700, 712, 713
LAUNCH_FAILED, NOT_SUPPORTED = 719, 801
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 900, 901
CAPTURE_ISOLATION, CAPTURE_IMPLICIT, CAPTURED_EVENT, WRONG_THREAD = 905, 906, 907, 908

GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2  # of captures
LEGACY, PER_THREAD = 1, 2  # streams
NON_BLOCKING = 1
STREAM, DURING_API_CALL, ANY = 1, 2, 3  # orders of a batch's sources

NEWEST = CONFIGURATIONS["13.1"]


class Attributes(ctypes.Structure):
    """`CUmemcpyAttributes`."""

    _fields_ = [
        ("order", ctypes.c_int),
        ("hints", ctypes.c_int * 4),
        ("flags", ctypes.c_uint),
    ]


class Rows(ctypes.Structure):
    """`CUDA_MEMCPY2D`, whose addresses the driver is to understand."""

    _fields_ = [
        ("src_x", ctypes.c_size_t),
        ("src_y", ctypes.c_size_t),
        ("src_kind", ctypes.c_int),
        ("src_host", ctypes.c_void_p),
        ("src", ctypes.c_uint64),
        ("src_array", ctypes.c_void_p),
        ("src_pitch", ctypes.c_size_t),
        ("dst_x", ctypes.c_size_t),
        ("dst_y", ctypes.c_size_t),
        ("dst_kind", ctypes.c_int),
        ("dst_host", ctypes.c_void_p),
        ("dst", ctypes.c_uint64),
        ("dst_array", ctypes.c_void_p),
        ("dst_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    ]


UNIFIED = 4


@cache
def the_card() -> Card:
    """One that nobody else in this process finds when he looks for a driver."""
    return Card(build_library("libcard.so"))


def as_argument(value: Any) -> Any:
    return ctypes.c_uint64(value % 2**64) if isinstance(value, int) else value


class Driver:
    """A program's side of the driver: entry points by name return errors; the others demand that
    there is none."""

    def __init__(self, configuration: Configuration) -> None:
        self.card = the_card()
        self.card.reset(configuration)
        self._kept: list[Any] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        entry = self.card.entry(name)
        return lambda *values: entry(*map(as_argument, values))

    def begin(self, ordinal: int = 0) -> Driver:
        assert self.cuInit(0) == 0
        self.use(ordinal)
        return self

    def use(self, ordinal: int) -> None:
        """Make a device's context current to the calling thread."""
        assert self.cuCtxSetCurrent(self.value("cuDevicePrimaryCtxRetain", ordinal)) == 0

    def value(self, name: str, *arguments: Any) -> int:
        """What a call writes where its first argument points."""
        made = ctypes.c_uint64()
        error = getattr(self, name)(ctypes.byref(made), *arguments)
        assert error == 0, self.card.last_complaint
        return made.value

    # -- what most tests need --

    def stream(self, flags: int = NON_BLOCKING) -> int:
        return self.value("cuStreamCreate", flags)

    def event(self, flags: int = 0) -> int:
        return self.value("cuEventCreate", flags)

    def device(self, num_bytes: int, fill: int | None = None) -> int:
        address = self.value("cuMemAlloc_v2", num_bytes)
        if fill is not None:
            write(address, bytes([fill]) * num_bytes)
            self.card.mark_written(address, num_bytes)
        return address

    def pinned(self, content: bytes) -> int:
        address = self.value("cuMemHostAlloc", len(content), 0)
        write(address, content)
        return address

    def pageable(self, num_bytes: int, fill: int = 0) -> int:
        """Memory of the program's own, which the driver does not know."""
        buffer = ctypes.create_string_buffer(bytes([fill]) * num_bytes, num_bytes)
        self._kept.append(buffer)
        return ctypes.addressof(buffer)

    def copy(self, dst: int, src: int, num_bytes: int, stream: int) -> None:
        assert self.cuMemcpyAsync(dst, src, num_bytes, stream) == 0, self.card.last_complaint

    def copy_rows(
        self, dst: tuple[int, int], src: tuple[int, int], width: int, height: int, stream: int
    ) -> int:
        """Of (address, pitch) each."""
        rows = Rows(src_kind=UNIFIED, dst_kind=UNIFIED, width=width, height=height)
        (rows.dst, rows.dst_pitch), (rows.src, rows.src_pitch) = dst, src
        return self.cuMemcpy2DAsync_v2(ctypes.byref(rows), stream)

    def copy_batch(
        self,
        entries: list[tuple[int, int, int]],
        stream: int,
        *,
        version: int = 2,
        attributes: list[Attributes] | None = None,
        first_entries: list[int] | None = None,
    ) -> tuple[int, int]:
        """Of (destination, source, bytes) each. The error, and the entry that the first version
        of the call says it is of."""
        attributes = [Attributes(order=STREAM)] if attributes is None else attributes
        first_entries = [0] if first_entries is None else first_entries
        columns = [(ctypes.c_uint64 * len(entries))(*each) for each in zip(*entries, strict=True)]
        failed = ctypes.c_uint64(12345)
        error = self.card.entry("cuMemcpyBatchAsync" + ("_v2" if version == 2 else ""))(
            *columns,
            ctypes.c_uint64(len(entries)),
            (Attributes * len(attributes))(*attributes),
            (ctypes.c_uint64 * len(first_entries))(*first_entries),
            ctypes.c_uint64(len(attributes)),
            *([] if version == 2 else [ctypes.byref(failed)]),
            ctypes.c_uint64(stream),
        )
        return error, failed.value


def read(address: int, num_bytes: int) -> bytes:
    """What lies there at this moment, whatever is still queued."""
    return ctypes.string_at(address, num_bytes)


def write(address: int, content: bytes) -> None:
    ctypes.memmove(address, content, len(content))


HEADER = ".version 8.0\n.target sm_90\n.address_size 64\n"
STORE_BYTE = (
    HEADER
    + """
.visible .entry kernel(.param .u64 kernel_param_0, .param .u32 kernel_param_1)
.reqntid 32
{
    .reg .pred %p<2>;
    .reg .b32 %r<4>;
    .reg .b64 %rd<2>;
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b32 %r1, [kernel_param_1];
    mov.u32 %r2, %tid.x;
    setp.eq.b32 %p1, %r2, 0;
    @%p1 st.global.b8 [ %rd1 + 0 ], { %r1 };
    ret;
}
"""
)
LOAD_BYTE = (
    HEADER
    + """
.visible .entry kernel(.param .u64 kernel_param_0)
.reqntid 32
{
    .reg .pred %p<2>;
    .reg .b32 %r<4>;
    .reg .b64 %rd<2>;
    ld.param.b64 %rd1, [kernel_param_0];
    mov.u32 %r2, %tid.x;
    setp.eq.b32 %p1, %r2, 0;
    @%p1 ld.global.b8 { %r1 }, [ %rd1 + 0 ];
    ret;
}
"""
)


def load(driver: Driver, text: str) -> int:
    module = driver.value("cuModuleLoadData", text.encode())
    return driver.value("cuModuleGetFunction", module, b"kernel")


def launch(driver: Driver, function: int, stream: int, *values: int, threads: int = 32) -> int:
    # The arguments' memory is the caller's again when this returns.
    arguments = [ctypes.c_uint64(value) for value in values]
    pointers = (ctypes.c_void_p * max(1, len(values)))(*map(ctypes.addressof, arguments))
    shape = (1, 1, 1, threads, 1, 1, 0)
    error = driver.cuLaunchKernel(function, *shape, stream, pointers, None)
    for argument in arguments:
        argument.value = 0
    return error
