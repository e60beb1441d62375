"""Work that is counted and not timed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


class CountedKey(bytes):
    """A key that counts how often it is compared: what lists search in C is seen so."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        CountedKey.compared += 1
        return bytes.__eq__(self, other)

    __hash__ = bytes.__hash__


def count_steps(action: Callable[[], object]) -> int:
    """How many bytecodes of this package run in `action`, and comparisons of counted keys."""
    steps = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal steps
        if "triton_offload" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        steps += event == "opcode"
        return trace

    before, tracer = CountedKey.compared, sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(tracer)
    return steps + CountedKey.compared - before


def count_calls(action: Callable[[], object], files: tuple[str, ...] = ("",)) -> int:
    """How many Python functions are called in `action` on this thread, of files that end so."""
    calls = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.endswith(files)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    return calls
