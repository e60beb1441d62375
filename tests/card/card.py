"""Python's door to the imitated card: builds it, says what card it is, and reads what it saw.

    card = start(Configuration(driver_version=12080))      # before anything loads CUDA
    from cuda.bindings import driver                       # NVIDIA's own, on this card

Work runs late, in an order that a seed picks; the rules are those of driver.h.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import triton

from . import build
from .machine import Counters, _Counters

SOURCES = (
    *build.MACHINE_SOURCES,
    "configuration.c",
    "contexts.c",
    "streams.c",
    "events.c",
    "capture.c",
    "modules.c",
    "allocations.c",
    "copies.c",
    "entry_points.c",
)

# What all who load the driver do: they ask for more than is there.
_LOOKUP = "cuGetProcAddress_v2: "

NOT_SUPPORTED = 801
OUT_OF_MEMORY = 2


@dataclass(frozen=True)
class Configuration:
    """What card, driver and system it is; an H100 with driver 12.8 where nothing is said."""

    driver_version: int = 12080  # 1000 * major + 10 * minor
    num_devices: int = 1
    compute_major: int = 9
    compute_minor: int = 0
    num_multiprocessors: int = 132
    num_copy_engines: int = 3
    integrated: int = 0
    pageable_memory_access: int = 0
    host_numa_id: int = 0
    refuses_overlap_flag: int = 0
    registering: int = 0  # what cuMemHostRegister returns; 0: it works
    pinning: int = 0  # and cuMemHostAlloc
    registered_offset: int = 0  # from a registered host address to the device's own
    device_bytes: int = 8 << 30
    seed: int = 0


#: one of the cards and systems that differ in what they allow, by name
CONFIGURATIONS = {
    "12.4": Configuration(driver_version=12040),
    "12.8": Configuration(),
    "12.9": Configuration(driver_version=12090),
    "13.0": Configuration(driver_version=13000),
    "13.1": Configuration(driver_version=13010),
    "wsl2": Configuration(registered_offset=1 << 44),
    "confidential": Configuration(registering=NOT_SUPPORTED),
    "unpinned": Configuration(registering=NOT_SUPPORTED, pinning=OUT_OF_MEMORY),
    "two devices": Configuration(num_devices=2),
    # Device memory is the host's own.
    "gb10": Configuration(
        driver_version=13000,
        compute_major=12,
        compute_minor=1,
        num_multiprocessors=48,
        num_copy_engines=2,
        integrated=1,
        pageable_memory_access=1,
    ),
    # Two memories, one page table.
    "gh200": Configuration(pageable_memory_access=1),
}


_WIDE = {"registered_offset", "device_bytes", "seed"}


class _Configuration(ctypes.Structure):
    """``card_configuration`` of driver.h."""


_Configuration._fields_ = [
    (field.name, ctypes.c_uint64 if field.name in _WIDE else ctypes.c_int32)
    for field in fields(Configuration)
]


class _Call(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("stream", ctypes.c_uint64),
        ("thread", ctypes.c_int32),
        ("ordinal", ctypes.c_int32),
        ("result", ctypes.c_int32),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [("function", ctypes.c_char_p), ("counters", _Counters)]


def _counters(raw: _Counters) -> Counters:
    named = {name: getattr(raw, name) for name, *_ in _Counters._fields_}
    by_width = dict(zip((1, 2, 4, 8, 16), named.pop("accesses_by_width"), strict=True))
    return Counters(accesses_by_width=by_width, **named)


class _Counts(ctypes.Structure):
    _fields_ = [("operations", ctypes.c_uint64), ("pageable_copies", ctypes.c_uint64)]


@dataclass(frozen=True)
class Call:
    """A call of an entry point, as it came."""

    name: str
    stream: int  # the handle that it named; 0 where it named none, or the legacy stream
    thread: int  # numbered from 1 in the order of their first calls
    ordinal: int  # of the device whose context was current; -1: none was
    result: int


class Card:
    """One card, in a library that this process has loaded.

    Args:
        library: See ``build_library``.
    """

    #: what it is since it was last reset
    configuration: Configuration

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in ("calls", "launches", "complaints"):
            getattr(self._library, f"card_num_{name}").restype = ctypes.c_uint64

    def reset(self, configuration: Configuration) -> None:
        """Begin anew with another card: all handles and addresses of the one before are void."""
        self.configuration = configuration
        values = [getattr(configuration, field.name) for field in fields(Configuration)]
        self._library.card_reset(ctypes.byref(_Configuration(*values)))

    # -- what is to fail --

    def inject(self, name: str, error: int, first: int = 1, last: int | None = None) -> None:
        """Let the calls ``first`` to ``last`` (None: only the first) of this entry point return
        ``error``, counted from now on; ``last=-1`` is for good. The name is the library's own,
        which ends in its version: ``cuMemFree_v2``.

        Raises:
            AttributeError: There is no such entry point.
        """
        self.entry(name)
        last = first if last is None else last
        self._library.card_inject(
            name.encode(),
            ctypes.c_uint64(first),
            ctypes.c_uint64(2**64 - 1 if last == -1 else last),
            error,
        )

    def inject_operation(self, number: int, error: int) -> None:
        """Let the ``number``-th copy, fill or launch from now on fail when it runs: the context
        is lost with it."""
        self._library.card_inject_operation(ctypes.c_uint64(number), error)

    def clear_injections(self) -> None:
        self._library.card_clear_injections()

    # -- what was seen --

    @property
    def num_calls(self) -> int:
        return int(self._library.card_num_calls())

    def calls(self, first: int = 0) -> list[Call]:
        """Those made since there were ``first``."""
        count = self.num_calls - first
        made = (_Call * count)()
        self._library.card_get_calls(ctypes.c_uint64(first), ctypes.c_uint64(count), made)
        return [
            Call(each.name.decode(), each.stream, each.thread, each.ordinal, each.result)
            for each in made
        ]

    def launches(self, first: int = 0) -> list[tuple[str, Counters]]:
        """The kernels that ran since there were ``first``, and what each came to."""
        count = int(self._library.card_num_launches()) - first
        made = (_Launch * count)()
        self._library.card_get_launches(ctypes.c_uint64(first), ctypes.c_uint64(count), made)
        return [(each.function.decode(), _counters(each.counters)) for each in made]

    def complaints(self) -> list[str]:
        """Why calls and operations failed, each with the call's name."""
        return [each for each in self._complaints() if not each.startswith(_LOOKUP)]

    def not_found(self) -> list[str]:
        """The entry points that were asked for and are not there, each with the reason."""
        return [each[len(_LOOKUP) :] for each in self._complaints() if each.startswith(_LOOKUP)]

    def _complaints(self) -> list[str]:
        text = ctypes.create_string_buffer(1024)
        found = []
        for index in range(int(self._library.card_num_complaints())):
            self._library.card_get_complaint(
                ctypes.c_uint64(index), text, ctypes.c_uint64(len(text))
            )
            found.append(text.value.decode())
        return found

    @property
    def last_complaint(self) -> str:
        """Empty where nothing failed."""
        return next(reversed(self.complaints()), "")

    @property
    def num_operations(self) -> int:
        """Copies, fills and launches that have run."""
        return self._counts().operations

    @property
    def num_pageable_copies(self) -> int:
        """Copies that made their submitter wait, since an end lay in pageable memory."""
        return self._counts().pageable_copies

    def _counts(self) -> _Counts:
        counts = _Counts()
        self._library.card_get_counts(ctypes.byref(counts))
        return counts

    # -- calls --

    def entry(self, name: str) -> Callable[..., int]:
        """An entry point as it is, whose arguments are ctypes' own; its result is the error."""
        return getattr(self._library, name)

    def mark_written(self, address: int, num_bytes: int) -> None:
        """Say that the host wrote this device memory, as only an imitation can."""
        self._library.card_mark_written(ctypes.c_uint64(address), ctypes.c_uint64(num_bytes))


def build_library(name: str, options: Sequence[str] = ()) -> Path:
    """The card as a shared library of this name."""
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    exported = f"-Wl,--version-script={build.HERE / 'exported.map'}"
    return build.shared_library(name, SOURCES, (f"-I{include}", exported, *options))


def start(configuration: Configuration) -> Card:
    """Let this process have a card: whoever loads ``libcuda.so.1`` from now on gets this one."""
    library = build_library("libcuda.so.1", ("-Wl,-soname,libcuda.so.1",))
    os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)
    card = Card(library)
    card.reset(configuration)
    return card
