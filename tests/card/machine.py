"""The imitated card's machine without a driver: modules of PTX, launches, what they came to."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any

from card.build import MACHINE_SOURCES, shared_library

REASON_BYTES = 1024


class Kind(IntEnum):
    """Of memory, as `memory_kind` in memory.h."""

    DEVICE = 0
    PINNED = 1
    REGISTERED = 2


class _Range(ctypes.Structure):
    _fields_ = [
        ("host", ctypes.c_uint64),
        ("device", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("kind", ctypes.c_int),
        ("ordinal", ctypes.c_int),
        ("written", ctypes.c_void_p),
    ]


class _Counters(ctypes.Structure):
    _fields_ = [
        ("instructions", ctypes.c_uint64),
        ("accesses_by_width", ctypes.c_uint64 * 5),
        ("lines", ctypes.c_uint64),
        ("accesses", ctypes.c_uint64),
        ("bytes_read", ctypes.c_uint64),
        ("bytes_written", ctypes.c_uint64),
        ("host_bytes_read", ctypes.c_uint64),
        ("host_bytes_written", ctypes.c_uint64),
        ("most_bytes_in_flight", ctypes.c_uint64),
        ("host_round_trips", ctypes.c_uint64),
        ("barriers", ctypes.c_uint64),
    ]


@dataclass(frozen=True)
class Counters:
    """What a launch came to: `ptx_counters` in ptx.h says what each is."""

    instructions: int
    accesses_by_width: dict[int, int]
    lines: int
    accesses: int
    bytes_read: int
    bytes_written: int
    host_bytes_read: int
    host_bytes_written: int
    most_bytes_in_flight: int
    host_round_trips: int
    barriers: int


class LaunchError(RuntimeError):
    """What a card would report: `code` is CUDA's number of the error."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(shared_library("libmachine.so", MACHINE_SOURCES)))
    library.memory_add.argtypes = [_Range, ctypes.c_int]
    library.memory_remove.argtypes = [ctypes.c_uint64]
    library.memory_mark_written.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
    library.memory_mark_written.restype = None
    library.ptx_load.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    library.ptx_load.restype = ctypes.c_void_p
    library.ptx_unload.argtypes = [ctypes.c_void_p]
    library.ptx_unload.restype = None
    library.ptx_find.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.ptx_find.restype = ctypes.c_void_p
    library.ptx_num_parameters.argtypes = [ctypes.c_void_p]
    library.ptx_parameter_bytes.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.ptx_parameter_bytes.restype = ctypes.c_uint32
    library.ptx_static_shared_bytes.argtypes = [ctypes.c_void_p]
    library.ptx_static_shared_bytes.restype = ctypes.c_uint32
    library.ptx_threads.argtypes = [ctypes.c_void_p]
    library.ptx_threads.restype = ctypes.c_uint32
    library.ptx_launch.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32 * 3,
        ctypes.c_uint32 * 3,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.POINTER(_Counters),
        ctypes.c_char_p,
        ctypes.c_size_t,
    ]
    return library


class Memory:
    """Ranges that kernels can reach, until the block ends: ``with Memory() as memory``.

    The table of ranges is the process's. Whoever adds a range keeps its bytes.
    """

    def __init__(self) -> None:
        self._hosts: list[int] = []

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        while self._hosts:
            _library().memory_remove(self._hosts.pop())

    def add(
        self,
        address: int,
        num_bytes: int,
        kind: Kind = Kind.DEVICE,
        *,
        written: bool = True,
        device_address: int | None = None,
        ordinal: int = -1,
    ) -> None:
        """Let kernels reach these bytes of this process.

        Args:
            written: False: reading a byte that no kernel and no `mark_written` wrote is an error.
            device_address: How kernels know them; None for the same address.
            ordinal: The one device that can reach them; -1 for all.

        Raises:
            ValueError: They overlap a range that is there.
        """
        device = address if device_address is None else device_address
        made = _Range(address, device, num_bytes, int(kind), ordinal, None)
        if _library().memory_add(made, int(not written)) != 0:
            raise ValueError(f"address: expected a range of its own, got {address:#x}")
        self._hosts.append(address)

    def mark_written(self, address: int, num_bytes: int) -> None:
        """Say that the host wrote these bytes."""
        _library().memory_mark_written(address, num_bytes)


class Module:
    """A module of PTX. Raises ValueError for what the machine does not know, with its line."""

    def __init__(self, text: str) -> None:
        reason = ctypes.create_string_buffer(REASON_BYTES)
        self._handle = _library().ptx_load(text.encode(), reason, REASON_BYTES)
        if not self._handle:
            raise ValueError(f"text: expected PTX that the machine knows, got {_text(reason)}")

    def __del__(self) -> None:
        if self._handle:
            _library().ptx_unload(self._handle)

    def function(self, name: str) -> Function:
        """Raises KeyError where there is none of this name."""
        handle = _library().ptx_find(self._handle, name.encode())
        if not handle:
            raise KeyError(name)
        return Function(self, handle)


class Function:
    """A kernel of a module."""

    def __init__(self, module: Module, handle: int) -> None:
        self._module = module  # kept as long as its functions
        self._handle = handle
        library = _library()
        self.threads: int = library.ptx_threads(handle)
        self.static_shared_bytes: int = library.ptx_static_shared_bytes(handle)
        self.parameter_bytes: list[int] = [
            library.ptx_parameter_bytes(handle, i)
            for i in range(library.ptx_num_parameters(handle))
        ]

    def launch(
        self,
        grid: int | Sequence[int],
        parameters: Sequence[int],
        *,
        block: int | Sequence[int] | None = None,
        shared_bytes: int = 0,
        ordinal: int = 0,
    ) -> Counters:
        """Run all CTAs to their end.

        Args:
            parameters: An integer for each.
            block: Threads of a CTA; None for what the kernel was compiled for.
            shared_bytes: Of dynamic shared memory.
            ordinal: The device.

        Raises:
            LaunchError: What a card would report, with the instruction and its thread.
        """
        values = [
            ctypes.create_string_buffer((value % (1 << 8 * size)).to_bytes(size, "little"), size)
            for value, size in zip(parameters, self.parameter_bytes, strict=True)
        ]
        pointers = (ctypes.c_void_p * (len(values) + 1))(*map(ctypes.addressof, values))
        counted, reason = _Counters(), ctypes.create_string_buffer(REASON_BYTES)
        error = _library().ptx_launch(
            self._handle,
            _three(grid),
            _three(self.threads if block is None else block),
            pointers,
            shared_bytes,
            ordinal,
            counted,
            reason,
            REASON_BYTES,
        )
        if error:
            raise LaunchError(error, _text(reason))
        named = {name: getattr(counted, name) for name, *_ in _Counters._fields_}
        by_width = dict(zip((1, 2, 4, 8, 16), named.pop("accesses_by_width"), strict=True))
        return Counters(accesses_by_width=by_width, **named)


def _three(count: int | Sequence[int]) -> Any:
    axes = [count] if isinstance(count, int) else [*count]
    return (ctypes.c_uint32 * 3)(*axes, *[1] * (3 - len(axes)))


def _text(reason: ctypes.Array[ctypes.c_char]) -> str:
    return reason.value.decode(errors="replace")
