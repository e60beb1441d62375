"""Batches of copies: one call of the driver, from arrays of addresses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from triton_offload.device.driver import Context, DriverError, call, entry_point
from triton_offload.specs import Ids

# Every driver since that of 12.8 has the function in this version, those of 13 and later too;
# newer bindings ask for a newer one, which the drivers of 12.8 and 12.9 lack.
_VERSION = 12080
_SIGNATURE = (
    *(ctypes.c_void_p,) * 3,  # destinations, sources, sizes
    ctypes.c_size_t,  # how many of each
    *(ctypes.c_void_p,) * 2,  # attributes, and the first copy that each is for
    ctypes.c_size_t,  # how many of these
    ctypes.c_void_p,  # where to write which copy failed
    ctypes.c_void_p,  # the stream
)
_IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
_OVERLAP_WITH_COMPUTE = 1  # CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE
_PLAIN = 0


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("hints", ctypes.c_int * 4),  # of managed memory; ours is none
        ("flags", ctypes.c_uint),
    )


class CopyBatches:
    """The batches that this driver takes, tried out."""

    def __init__(self, submit: Callable[..., None], flags: int) -> None:
        self._submit = submit
        # Never in any order: the source would be read before the work that the stream waits for.
        self._attributes = _Attributes(_IN_STREAM_ORDER, flags=flags)
        self._first = ctypes.c_size_t(0)

    def copy(self, dst: Ids, src: Ids, sizes: Ids, stream: int) -> None:
        """Queue copies of `sizes[i]` bytes from address `src[i]` to `dst[i]`, all int64 [n]: at
        least one, and none of no bytes. Raises DriverError; some of them may be queued then."""
        failed = ctypes.c_size_t(0)
        arrays = [np.ascontiguousarray(each, dtype=np.int64) for each in (dst, src, sizes)]
        self._submit(
            *(array.ctypes.data for array in arrays),
            len(sizes),
            ctypes.addressof(self._attributes),
            ctypes.addressof(self._first),
            1,
            ctypes.addressof(failed),
            stream,
        )


def find_batches(context: Context) -> CopyBatches | str:
    """The batches of this driver, by a batch of two bytes on a stream of its own; or why it has
    none. It has them where that works, whatever its version or that of the bindings."""
    submit = entry_point("cuMemcpyBatchAsync", _VERSION, *_SIGNATURE)
    if submit is None:
        return "the driver has no cuMemcpyBatchAsync: it came with CUDA 12.8"
    why = ""
    for flags in (_OVERLAP_WITH_COMPUTE, _PLAIN):
        batches = CopyBatches(submit, flags)
        try:
            with context.beside_captures():
                _try_out(batches)
        except DriverError as error:
            why = str(error)
        else:
            return batches
    return why


def _try_out(batches: CopyBatches) -> None:
    memory = call("cuMemAlloc", 4)
    try:
        stream = call("cuStreamCreate", 1)  # CU_STREAM_NON_BLOCKING
        try:
            call("cuMemsetD8Async", memory, 0, 4, stream)
            places = int(memory) + np.arange(4)
            batches.copy(places[2:], places[:2], np.ones(2, dtype=np.int64), int(stream))
            call("cuStreamSynchronize", stream)
        finally:
            call("cuStreamDestroy", stream)
    finally:
        call("cuMemFree", memory)
