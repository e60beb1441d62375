"""Plug-ins of vLLM's that spoil what our plug-in moves, in every process of a server.

vLLM finds them by the entry points of a distribution, as it finds a user's.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from faulty import fail

from triton_offload.device import host_pages
from triton_offload.device.host import HostDevice


class _EveryTenthFails(HostDevice):
    """Of what gathers pages each tenth fails under way, of what scatters them, too."""

    def __init__(self) -> None:
        super().__init__()
        self._moves = Counter[Any]()

    def _move(self, move: Any, stream: Any, *args: Any) -> None:
        self._moves[move] += 1
        if self._moves[move] % 10 == 0:
            move = fail
        super()._move(move, stream, *args)


class _FlippedStores(HostDevice):
    """What is stored has the sign of every float wrong."""

    def _move(self, move: Any, stream: Any, *args: Any) -> None:
        super()._move(_gather_flipped if move is host_pages.gather else move, stream, *args)


def _gather_flipped(table: Any, block_ids: Any, slots: Any, slot_ids: Any, *args: Any) -> None:
    host_pages.gather(table, block_ids, slots, slot_ids, *args)
    slots[slot_ids] ^= 0x80


def every_tenth_fails() -> None:
    _use(_EveryTenthFails)


def flipped_stores() -> None:
    _use(_FlippedStores)


def _use(device: type[HostDevice]) -> None:
    from triton_offload.vllm import spec

    spec.device_for = lambda *args: device()  # type: ignore[attr-defined]
