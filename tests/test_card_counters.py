"""What the imitated card counts of a launch: kernels of which one can say what it must be."""

from __future__ import annotations

import numpy as np
import pytest
from card.build import NO_COMPILER, compiler
from card.machine import Counters, Kind, Memory
from ptx_text import kernel, run, words

pytestmark = pytest.mark.skipif(compiler() is None, reason=NO_COMPILER)

#: instructions of a kernel's head and its `ret`
FRAME = 11


def aligned(count: int) -> np.ndarray:
    """Words that begin with a line."""
    buffer = words([1] * (count + 16))
    start = -buffer.ctypes.data % 128 // 8
    return buffer[start : start + count]


def count(
    body: str, *, block: int = 32, grid: int = 1, kind: Kind = Kind.PINNED, inside: str = ""
) -> Counters:
    """Of a kernel with 512 words a thread to read and one to write; `kind` of what it reads."""
    out, source = aligned(block * grid), aligned(512 * block * grid)
    return run(kernel(body, inside=inside), out, source, block=block, grid=grid, kind=kind)


def test_instructions_are_a_warp_each() -> None:
    assert count("").instructions == FRAME
    assert count("", block=64, grid=3).instructions == 6 * FRAME
    assert count("    mov.b32 %r5, 1;\n    mov.b32 %r6, 1;").instructions == FRAME + 2
    # Held back or not, it is issued.
    never = "    setp.lt.u32 %p1, %r0, 0;\n    @%p1 mov.b32 %r5, 1;"
    assert count(never).instructions == FRAME + 2
    # Two ways of a branch are taken one after the other.
    parted = """
    setp.lt.u32 %p1, %r0, 8;
    @%p1 bra ONE;
    mov.b32 %r5, 1;
    mov.b32 %r5, 2;
ONE:
    mov.b32 %r6, 1;"""
    assert count(parted).instructions == FRAME + 5


@pytest.mark.parametrize(
    ("stride", "lines", "bytes_read"),
    [(8, 2, 256), (16, 4, 256), (128, 32, 256), (4096, 32, 256), (0, 1, 8)],
)
def test_lines_and_bytes_of_an_access(stride: int, lines: int, bytes_read: int) -> None:
    body = f"    mad.lo.u64 %d1, %d0, {stride // 8}, %d11;\n    ld.global.b64 %d2, [%d1];"
    counted = count(body)
    assert counted.accesses == 1
    assert counted.accesses_by_width == {1: 0, 2: 0, 4: 0, 8: 32, 16: 0}
    assert (counted.lines, counted.bytes_read) == (lines, bytes_read)
    assert counted.host_bytes_read == bytes_read
    assert count(body, kind=Kind.DEVICE).host_bytes_read == 0


def test_lines_that_an_access_touches_at_their_edges() -> None:
    body = "    add.s64 %d1, %d11, %d0;\n    ld.global.b64 %d2, [%d1+OFFSET];"
    assert [count(body.replace("OFFSET", str(at))).lines for at in (0, 8, 120, 128)] == [2, 3, 3, 2]


def test_accesses_of_lanes_that_are_held_back_do_not_count() -> None:
    body = """
    setp.lt.u32 %p1, %r0, LANES;
    @%p1 st.global.b64 [%d14], %d0;"""
    counted = count(body.replace("LANES", "3"))
    assert (counted.accesses, counted.accesses_by_width[8], counted.bytes_written) == (1, 3, 24)
    assert counted.host_bytes_written == 0
    counted = count(body.replace("LANES", "0"))
    assert (counted.accesses, counted.lines, counted.bytes_written) == (0, 0, 0)


LOAD = """
    mad.lo.u64 %d1, %d0, 2, %d11;
    ld.global.v2.b64 {%d2, %d3}, [%d1];
    ld.global.v2.b64 {%d4, %d5}, [%d1+1024];
"""


def test_bytes_in_flight() -> None:
    assert count(LOAD).most_bytes_in_flight == 1024
    assert count(LOAD, block=128).most_bytes_in_flight == 4096  # of all warps of a CTA
    assert count(LOAD, block=128, grid=5).most_bytes_in_flight == 4096  # not of all CTAs
    # The first use of what a load brings ends it, even of its other half.
    for use in ("add.s64 %d6, %d3, 1;", "st.global.b64 [%d14], %d2;", "mov.b64 %d3, 0;"):
        again = f"{LOAD}    {use}\n    ld.global.v2.b64 {{%d7, %d8}}, [%d1+2048];"
        assert count(again).most_bytes_in_flight == 1024
    untouched = f"{LOAD}    mov.b64 %d6, 1;\n    ld.global.v2.b64 {{%d7, %d8}}, [%d1+2048];"
    assert count(untouched).most_bytes_in_flight == 1536
    # Into the same registers again: the load before comes first.
    over = f"{LOAD}    ld.global.v2.b64 {{%d2, %d3}}, [%d1+2048];"
    assert count(over).most_bytes_in_flight == 1024


CHAIN = "    ld.global.b64 %d2, [%d11];\n    add.s64 %d3, %d11, %d2;\n"
NEXT = "    add.s64 %d4, %d3, 7;\n    ld.global.b64 %d5, [%d4];\n    add.s64 %d6, %d5, 1;\n"


def test_round_trips_to_host_memory() -> None:
    assert count("").host_round_trips == 0
    assert count(LOAD).host_round_trips == 0  # nobody waits
    assert count(f"{LOAD}    add.s64 %d6, %d2, %d4;").host_round_trips == 1  # both at once
    assert count(CHAIN).host_round_trips == 1
    assert count(CHAIN + NEXT).host_round_trips == 2
    assert count(CHAIN + NEXT, kind=Kind.DEVICE).host_round_trips == 0
    assert count(CHAIN + NEXT, block=64, grid=4).host_round_trips == 2
    # A warp issues in order: what comes after a wait begins after it, needed or not.
    later = f"{CHAIN}    ld.global.b64 %d5, [%d11+8];\n    add.s64 %d6, %d5, 1;"
    assert count(later).host_round_trips == 2
    loop = """
    mov.b32 %r5, 0;
AGAIN:
    ld.global.b64 %d2, [%d11];
    add.s64 %d3, %d2, 1;
    add.s32 %r5, %r5, 1;
    setp.lt.s32 %p1, %r5, 7;
    @%p1 bra AGAIN;"""
    assert count(loop).host_round_trips == 7


def test_a_load_of_device_memory_after_one_of_the_host_is_none() -> None:
    out, source = aligned(32), aligned(32)
    body = "    ld.global.b64 %d2, [%d11];\n    add.s64 %d3, %d10, %d2;\n"
    body += "    ld.global.b64 %d4, [%d3+7];\n    st.global.b64 [%d14], %d4;"
    with Memory() as memory:
        memory.add(out.ctypes.data, out.nbytes)
        memory.add(source.ctypes.data, source.nbytes, Kind.REGISTERED)
        parameters = [out.ctypes.data, source.ctypes.data, 0, 0]
        counted = kernel(body).launch(1, parameters, block=32)
    assert counted.host_round_trips == 1
    assert (counted.bytes_read, counted.host_bytes_read) == (16, 8)


BUFFER = ".shared .align 16 .b8 buffer[4096];"


def test_a_barrier_waits_for_the_last_warp() -> None:
    """One warp waits for the host twice before the barrier, the other once after it."""
    body = f"""
    setp.ge.u32 %p1, %r0, 32;
    @%p1 bra MEET;
{CHAIN}{NEXT}
MEET:
    bar.sync 0;
    setp.lt.u32 %p2, %r0, 32;
    @%p2 bra DONE;
{CHAIN}
DONE:"""
    assert count(body, block=64).host_round_trips == 3
    assert count(body.replace("bar.sync 0;", ""), block=64).host_round_trips == 2
    assert count(body, block=64).barriers == 1
    assert count("    bar.sync 0;\n    bar.sync 0;", block=64, grid=3).barriers == 2


def test_copies_into_shared_memory_are_in_flight_until_they_land() -> None:
    copy = """
    shl.b32 %r5, %r0, 4;
    mov.b32 %r4, buffer;
    add.s32 %r6, %r4, %r5;
    mad.lo.u64 %d1, %d0, 2, %d11;
    cp.async.cg.shared.global [%r6], [%d1], 16;
    cp.async.commit_group;
    cp.async.cg.shared.global [%r6+512], [%d1+512], 16;
    cp.async.commit_group;
"""
    third = "    cp.async.cg.shared.global [%r6+1024], [%d1+1024], 16;\n"
    counted = count(copy, inside=BUFFER)
    assert counted.most_bytes_in_flight == 1024
    assert counted.accesses_by_width[16] == 64
    assert (counted.bytes_read, counted.lines) == (1024, 8)
    assert counted.host_round_trips == 0
    waited = f"{copy}    cp.async.wait_group 1;\n{third}"
    assert count(waited, inside=BUFFER).most_bytes_in_flight == 1024
    assert count(copy + third, inside=BUFFER).most_bytes_in_flight == 1536
    all_of_it = f"{waited}    cp.async.wait_all;"
    assert count(waited, inside=BUFFER).host_round_trips == 1
    assert count(all_of_it, inside=BUFFER).host_round_trips == 2
    assert count(all_of_it, inside=BUFFER, kind=Kind.DEVICE).host_round_trips == 0
