"""Small kernels in PTX, written by hand, and running them over arrays of numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from card.machine import Counters, Function, Kind, Memory, Module

Words = npt.NDArray[np.uint64]

_HEAD = """\
.version 8.0
.target sm_90
.address_size 64
{outside}
.visible .entry kernel(
    .param .u64 param_out, .param .u64 param_a, .param .u64 param_b, .param .u64 param_c
)
{{
    .reg .pred %p<10>;
    .reg .b16 %h<10>;
    .reg .b32 %r<20>;
    .reg .b64 %d<20>;
    {inside}
    mov.u32 %r10, %ctaid.x;
    mov.u32 %r11, %ntid.x;
    mov.u32 %r12, %tid.x;
    mad.lo.s32 %r0, %r10, %r11, %r12;
    mul.wide.u32 %d0, %r0, 8;
    ld.param.u64 %d10, [param_out];
    ld.param.u64 %d11, [param_a];
    ld.param.u64 %d12, [param_b];
    ld.param.u64 %d13, [param_c];
    add.s64 %d14, %d10, %d0;
"""
_SOURCES = """\
    add.s64 %d15, %d11, %d0;
    add.s64 %d16, %d12, %d0;
    add.s64 %d17, %d13, %d0;
    ld.global.b64 %d1, [%d15];
    ld.global.b64 %d2, [%d16];
    ld.global.b64 %d3, [%d17];
    cvt.u32.u64 %r1, %d1;
    cvt.u32.u64 %r2, %d2;
    cvt.u32.u64 %r3, %d3;
    cvt.u16.u64 %h1, %d1;
    cvt.u16.u64 %h2, %d2;
    cvt.u16.u64 %h3, %d3;
    setp.ne.b64 %p1, %d1, 0;
    setp.ne.b64 %p2, %d2, 0;
    setp.ne.b64 %p3, %d3, 0;
"""
#: the last line of the program, so that errors name lines that a test can count
BODY_LINE = 1 + len(_HEAD.format(outside="", inside="").splitlines())


def text_of(body: str, *, outside: str = "", inside: str = "", sources: bool = False) -> str:
    """A module whose `kernel` has its thread's number in %r0 and eight times that in %d0; %d10 to
    %d13: where out, a, b and c begin; %d14: its own word of out. `sources`: its words of a, b and c
    in %d1 to %d3, their low halves in %r1 to %r3, their low quarters in %h1 to %h3, and whether
    they differ from 0 in %p1 to %p3."""
    head = _HEAD.format(outside=outside, inside=inside)
    return f"{head}{_SOURCES if sources else ''}{body}\n    ret;\n}}\n"


def kernel(body: str, *, outside: str = "", inside: str = "", sources: bool = False) -> Function:
    return Module(text_of(body, outside=outside, inside=inside, sources=sources)).function("kernel")


def words(values: Sequence[int]) -> Words:
    return np.array([value % 2**64 for value in values], dtype=np.uint64)


def run(
    function: Function,
    out: npt.NDArray[np.generic],
    *sources: npt.NDArray[np.generic],
    block: int = 32,
    grid: int = 1,
    shared_bytes: int = 0,
    kind: Kind = Kind.DEVICE,
    written: bool = True,
) -> Counters:
    """Launch it on arrays, which lie in memory of this `kind`. `written`: of the sources."""
    arrays = [out, *sources]
    with Memory() as memory:
        for array in arrays:
            memory.add(
                array.ctypes.data,
                array.nbytes,
                kind if array is not out else Kind.DEVICE,
                written=written and array is not out,
            )
        addresses = [array.ctypes.data for array in arrays]
        parameters = [*addresses, *[0] * (4 - len(addresses))]
        return function.launch(grid, parameters, block=block, shared_bytes=shared_bytes)


def compute(body: str, *sources: Sequence[int]) -> list[int]:
    """What `body` leaves in %d9, for each row of the sources; those left out are 0."""
    count = len(sources[0])
    rows = -(-count // 32) * 32
    columns = [
        words([*column, *[column[0]] * (rows - count)])
        for column in (*sources, *[[0] * count] * (3 - len(sources)))
    ]
    out = words([0] * rows)
    function = kernel(body + "\n    st.global.b64 [%d14], %d9;", sources=True)
    run(function, out, *columns, grid=rows // 32)
    return [int(value) for value in out[:count]]
