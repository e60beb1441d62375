"""Memory of the CUDA driver as tensors, given back when the last tensor over it goes."""

from __future__ import annotations

import ctypes
import weakref
from contextlib import suppress
from typing import Any

import torch

from triton_offload.device.driver import Context, DriverError, call

# For every context, and with an address for kernels. The flags of allocating and registering have
# the same values.
PORTABLE_MAPPED = 0x1 | 0x2


class _DeviceMemory:
    """What torch makes a tensor of, and holds as long as that lives."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def device_bytes(context: Context, device: torch.device, num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes] on the card, uninitialised. Not torch's: it keeps none of it when it is
    freed, and nothing that torch has queued uses it. Raises DriverError."""
    try:
        address = _allocate(context, num_bytes)
    except DriverError as error:
        if not error.out_of_memory:
            raise
        torch.cuda.empty_cache()  # what torch holds free
        address = _allocate(context, num_bytes)
    memory = _freed_with(_DeviceMemory(address, num_bytes), context, "cuMemFree", address)
    with torch.inference_mode(False):
        return torch.as_tensor(memory, device=device)


def pinned_bytes(context: Context, num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes] in pinned host memory, uninitialised, which has one address for the host
    and for kernels. Raises DriverError."""
    with context.beside_captures():
        address = int(call("cuMemHostAlloc", num_bytes, PORTABLE_MAPPED))
    array = (ctypes.c_uint8 * num_bytes).from_address(address)
    memory = _freed_with(array, context, "cuMemFreeHost", address)
    with torch.inference_mode(False):
        return torch.frombuffer(memory, dtype=torch.uint8)


def _allocate(context: Context, num_bytes: int) -> int:
    with context.beside_captures():
        return int(call("cuMemAlloc", num_bytes))


def _freed_with(owner: Any, context: Context, free: str, address: int) -> Any:
    """At the process's end the driver frees it."""
    weakref.finalize(owner, _free, context, free, address).atexit = False
    return owner


def _free(context: Context, free: str, address: int) -> None:
    with suppress(DriverError), context.beside_captures():  # a lost context has freed it
        call(free, address)
