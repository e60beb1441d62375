"""The CUDA driver: its calls, errors by name, one card's context and attributes.

cuda-bindings makes the calls. It asks the driver for each function in the version of its own
release, which an older driver may lack; such functions are had by `entry_point`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

_SUCCESS, _OUT_OF_MEMORY, _NOT_READY = 0, 2, 600
# Of a stream that captures a graph, or, in the default mode, of any thread while one does.
_CAPTURE_ERRORS = range(900, 909)


class DriverError(RuntimeError):
    """`code` is the CUresult of the call."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call}: {name} ({code})")
        self.code = code

    @property
    def out_of_memory(self) -> bool:
        return self.code == _OUT_OF_MEMORY

    @property
    def not_ready(self) -> bool:
        """What was asked for is still under way."""
        return self.code == _NOT_READY

    @property
    def captures(self) -> bool:
        """The call was refused because a graph is captured; it says nothing of what it is about."""
        return self.code in _CAPTURE_ERRORS


@functools.cache
def bindings() -> Any:
    """cuda-bindings' module of the driver. Raises RuntimeError where it is not installed."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise RuntimeError(
            "the CUDA device needs cuda-bindings 12.8 or later: pip install 'triton-offload[cuda]'"
        ) from error


def call(name: str, *arguments: Any) -> Any:
    """The driver's function of that name: what it hands back, a tuple unless it is one. Raises
    DriverError."""
    error, *results = getattr(bindings(), name)(*arguments)
    if error != _SUCCESS:
        raise DriverError(name, int(error), error.name)
    return results[0] if len(results) == 1 else tuple(results)


def entry_point(name: str, version: int, *types: Any) -> Callable[..., None] | None:
    """The driver's own function as CUDA `version` (12080 for 12.8) has it, called with arguments of
    these ctypes, arrays by their address; None where this driver has none. Raises DriverError."""
    try:
        address, _ = call("cuGetProcAddress", name.encode(), version, 0)
    except DriverError:
        return None
    if not address:
        return None
    function = ctypes.CFUNCTYPE(ctypes.c_int, *types)(int(address))

    def checked(*arguments: Any) -> None:
        code = function(*arguments)
        if code != _SUCCESS:
            raise DriverError(name, code, bindings().CUresult(code).name)

    return checked


class Context:
    """The context of one card that torch's work is in, too. `with` it, a thread's calls are in it;
    afterwards in what they were in before. One object serves all threads."""

    def __init__(self, index: int) -> None:
        call("cuInit", 0)
        self._card = call("cuDeviceGet", index)
        self._handle = call("cuDevicePrimaryCtxRetain", self._card)
        # Called around every other call: by name they would take twice as long.
        self._push, self._pop = bindings().cuCtxPushCurrent, bindings().cuCtxPopCurrent

    def __enter__(self) -> None:
        (error,) = self._push(self._handle)
        if error != _SUCCESS:
            raise DriverError("cuCtxPushCurrent", int(error), error.name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pop()

    @contextmanager
    def beside_captures(self) -> Iterator[None]:
        """In the context, with what a graph capture forbids all threads in its default mode (to
        query, allocate, register, synchronise): done here it neither fails nor ends the capture.
        """
        with self:
            relaxed = bindings().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
            before = call("cuThreadExchangeStreamCaptureMode", relaxed)
            try:
                yield
            finally:
                call("cuThreadExchangeStreamCaptureMode", before)

    def attribute(self, name: str) -> int | None:
        """What the driver says of the card (CU_DEVICE_ATTRIBUTE_...); None where it does not know
        the question."""
        which = getattr(bindings().CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        try:
            return int(call("cuDeviceGetAttribute", which, self._card))
        except DriverError:
            return None

    def bus_id(self) -> str:
        """The card's PCI address, as sysfs names it."""
        text: bytes = call("cuDeviceGetPCIBusId", 16, self._card)
        return text.split(b"\0")[0].decode().lower()


@functools.cache
def context_of(index: int) -> Context:
    """The one of the card that torch calls `cuda:index`. The process keeps it, as torch does."""
    return Context(index)
