"""The imitated card is as strict as hardware, and where hardware would go wrong silently, stricter.

Each rule with the error that a card reports, and what the message says: the instruction, its line,
CTA and thread, and the address with the range nearest to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from card.build import NO_COMPILER, compiler
from card.machine import Kind, LaunchError, Memory, Module
from ptx_text import BODY_LINE, kernel, run, text_of, words

pytestmark = pytest.mark.skipif(compiler() is None, reason=NO_COMPILER)

BUFFER = ".shared .align 16 .b8 buffer[1024];"
INVALID, ILLEGAL, MISALIGNED, FAILED = 1, 700, 716, 719


def error_of(
    body: str,
    *sources: npt.NDArray[np.generic],
    block: int = 32,
    grid: int = 1,
    inside: str = "",
    written: bool = True,
) -> LaunchError:
    out = words([0] * block * grid)
    with pytest.raises(LaunchError) as caught:
        run(kernel(body, inside=inside), out, *sources, block=block, grid=grid, written=written)
    return caught.value


def check(error: LaunchError, code: int, *parts: str) -> None:
    assert error.code == code, str(error)
    for part in parts:
        assert part in str(error)


def test_a_byte_outside_of_all_ranges() -> None:
    source = words([0] * 32)
    body = "    add.s64 %d1, %d11, %d0;\n    ld.global.b64 %d2, [%d1+8];"
    error = error_of(body, source, block=32)
    end = source.ctypes.data + source.nbytes
    nearest = f"0 bytes behind [{source.ctypes.data:#x}, {end:#x}) of device memory"
    check(error, ILLEGAL, "read of 8 bytes", "are in no range", f"at {end:#x}", nearest)
    check(error, ILLEGAL, f"`ld.global.b64 %d2, [%d1+8]` in line {BODY_LINE + 1} of kernel")
    check(error, ILLEGAL, "CTA (0, 0, 0), thread (31, 0, 0)")


def test_a_byte_before_all_ranges_and_a_write() -> None:
    source = words([0] * 32)
    error = error_of("    st.global.b32 [%d11+-4], 1;", source)
    check(error, ILLEGAL, "write of 4 bytes", f"4 bytes before [{source.ctypes.data:#x}")


def test_an_access_that_reaches_past_the_end() -> None:
    source = np.zeros(31, dtype=np.uint8)
    source = source[-source.ctypes.data % 16 :][:15]
    error = error_of("    ld.global.v2.b64 {%d1, %d2}, [%d11];", source)
    check(error, ILLEGAL, "16 bytes", "reach past the end")


@pytest.mark.parametrize(
    ("access", "size", "off"),
    [
        ("ld.global.b16 %h1, [%d11+1]", 2, 1),
        ("ld.global.b32 %r1, [%d11+2]", 4, 2),
        ("ld.global.b64 %d1, [%d11+4]", 8, 4),
        ("ld.global.v2.b64 {%d1, %d2}, [%d11+8]", 16, 8),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d11+4]", 16, 4),
        ("st.global.v2.b32 [%d11+4], {%r0, %r0}", 8, 4),
    ],
)
def test_a_misaligned_access(access: str, size: int, off: int) -> None:
    source = words([0] * 34)
    source = source[source.ctypes.data % 16 // 8 :]
    error = error_of(f"    {access};", source)
    check(error, MISALIGNED, f"{size} bytes at {source.ctypes.data + off:#x}", "no multiple")
    check(error, MISALIGNED, access, "thread (0, 0, 0)")


def test_a_read_of_memory_that_nobody_wrote() -> None:
    source = words([0] * 32)
    body = """
    st.global.b64 [%d11], 1;
    add.s64 %d1, %d11, %d0;
    ld.global.b64 %d2, [%d1];"""
    error = error_of(body, source, written=False)
    place = source.ctypes.data + 8  # the first word was written by the kernel
    check(error, ILLEGAL, f"the byte at {place:#x} of [", "was never written", "thread (1, 0, 0)")


@pytest.mark.parametrize("owner", [0, 1])
def test_memory_of_another_device(owner: int) -> None:
    out, other = words([0] * 32), 1 - owner
    reason = f"device memory of device {owner}, not of device {other}"
    with Memory() as memory:
        memory.add(out.ctypes.data, out.nbytes, ordinal=owner)
        function = kernel("    st.global.b64 [%d14], 1;")
        function.launch(1, [out.ctypes.data, 0, 0, 0], block=32, ordinal=owner)
        with pytest.raises(LaunchError, match=reason):
            function.launch(1, [out.ctypes.data, 0, 0, 0], block=32, ordinal=other)


def test_memory_that_the_device_knows_by_another_address() -> None:
    out = words([0] * 32)
    elsewhere = 0x7000_0000_0000
    with Memory() as memory:
        memory.add(out.ctypes.data, out.nbytes, Kind.REGISTERED, device_address=elsewhere)
        function = kernel("    st.global.b64 [%d14], %d0;")
        function.launch(1, [elsewhere, 0, 0, 0], block=32)
        assert out.tolist() == [8 * i for i in range(32)]
        with pytest.raises(LaunchError, match="are in no range"):
            function.launch(1, [out.ctypes.data, 0, 0, 0], block=32)


def test_ranges_do_not_overlap_and_go_with_their_block() -> None:
    out = words([0] * 32)
    begin, size = out.ctypes.data, out.nbytes
    for _ in range(2):
        with Memory() as memory:
            memory.add(begin + 64, 64)
            for low, high in ((0, 65), (64, 128), (127, 200), (0, 200), (80, 90)):
                with pytest.raises(ValueError, match="expected a range of its own"):
                    memory.add(begin + low, high - low)
            memory.add(begin, 64)
            memory.add(begin + 128, size - 128)


def test_a_register_that_was_not_written() -> None:
    body = """
    setp.lt.u32 %p1, %r0, 9;
    @%p1 mov.b32 %r5, 1;
    add.s32 %r6, %r5, 1;"""
    check(error_of(body), FAILED, "register %r5 is read before it was written", "thread (9, 0, 0)")
    body = """
    setp.eq.s32 %p1, %r10, 0;
    @%p1 mov.b32 %r5, 1;
    add.s32 %r6, %r5, 1;"""
    check(error_of(body, grid=2), FAILED, "register %r5 is read", "CTA (1, 0, 0), thread (0, 0, 0)")
    guard = error_of("    @%p7 mov.b32 %r5, 1;")
    check(guard, FAILED, "register %p7 is read before it was written")


def test_a_division_by_zero() -> None:
    check(error_of("    div.s32 %r5, 8, %r0;"), FAILED, "division by 0", "thread (0, 0, 0)")


SHARED = "    mov.b32 %r4, buffer;\n    shl.b32 %r5, %r0, 3;\n    add.s32 %r6, %r4, %r5;\n"


@pytest.mark.parametrize(
    ("body", "code", "words_of_it"),
    [
        ("ld.shared.b64 %d5, [%r6];", ILLEGAL, "0x0 of shared memory was never written"),
        ("st.shared.b64 [%r6+1000], %d0;", ILLEGAL, "of shared memory the CTA has 0x400 bytes"),
        ("st.shared.b64 [%r6+-8], %d0;", ILLEGAL, "are in no range"),
        ("st.shared.b64 [%r6+4], %d0;", MISALIGNED, "8 bytes at 0x4 of shared memory"),
    ],
)
def test_shared_memory_has_an_end_and_must_be_written(
    body: str, code: int, words_of_it: str
) -> None:
    check(error_of(f"{SHARED}    {body}", inside=BUFFER), code, words_of_it)


def test_shared_memory_of_one_cta_is_not_that_of_the_next() -> None:
    body = f"""{SHARED}
    setp.eq.s32 %p1, %r10, 0;
    @%p1 st.shared.b64 [%r6], %d0;
    ld.shared.b64 %d5, [%r6];"""
    body = body.replace("%r0, 3", "%r12, 3")
    check(error_of(body, inside=BUFFER, grid=2), ILLEGAL, "never written", "CTA (1, 0, 0)")


def test_what_another_warp_wrote_is_there_after_a_barrier() -> None:
    write = f"{SHARED}    st.shared.b64 [%r6], %d0;\n"
    read = "    xor.b32 %r7, %r6, 256;\n    ld.shared.b64 %d5, [%r7];\n    bar.sync 0;"
    out = words([0] * 64)
    run(kernel(f"{write}    bar.sync 0;\n{read}", inside=BUFFER), out, block=64)
    # Warp 0 finds nothing there yet, warp 1 what warp 0 has just written.
    check(error_of(write + read, inside=BUFFER, block=64), ILLEGAL, "never written")
    late = f"{write}    setp.lt.u32 %p1, %r0, 32;\n    @%p1 bra LAST;\n{read}\n    ret;\nLAST:\n"
    error = error_of(late + "    bar.sync 0;", inside=BUFFER, block=64)
    check(error, FAILED, "warp 0 wrote 0x0 of shared memory, and no barrier came since")


def test_what_another_warp_reads_is_written_after_a_barrier() -> None:
    body = f"""{SHARED}
    st.shared.b64 [%r6], %d0;
    bar.sync 0;
    setp.lt.u32 %p1, %r0, 32;
    @%p1 ld.shared.b64 %d5, [%r6+256];
    BETWEEN
    @!%p1 st.shared.b64 [%r6], %d0;"""
    error = error_of(body.replace("BETWEEN", ""), inside=BUFFER, block=64)
    check(error, FAILED, "another warp read 0x100 of shared memory, and no barrier came since")
    whole = kernel(body.replace("BETWEEN", "bar.sync 0;"), inside=BUFFER)
    run(whole, words([0] * 64), block=64)


def test_what_several_warps_read_none_of_them_writes_before_a_barrier() -> None:
    body = f"""{SHARED}
    st.shared.b64 [%r6], %d0;
    bar.sync 0;
    ld.shared.b64 %d5, [%r4];
    setp.eq.u32 %p1, %r0, WRITER;
    @%p1 st.shared.b64 [%r4], %d0;"""
    out = words([0] * 64)
    run(kernel(body.replace("WRITER", "64"), inside=BUFFER), out, block=64)
    error = error_of(body.replace("WRITER", "33"), inside=BUFFER, block=64)
    check(error, FAILED, "another warp read 0x0 of shared memory", "thread (33, 0, 0)")


COPY = f"""{SHARED}
    mul.wide.u32 %d4, %r0, 8;
    add.s64 %d5, %d11, %d4;
    cp.async.ca.shared.global [%r6], [%d5], 8;
    cp.async.commit_group;
"""


def test_a_copy_is_there_when_it_was_waited_for() -> None:
    source, out = words(range(64)), words([0] * 32)
    read = "    ld.shared.b64 %d6, [%r6];\n    st.global.b64 [%d14], %d6;"
    error = error_of(COPY + read, source, inside=BUFFER)
    check(error, FAILED, "read before wait_group: a copy to 0x0 of shared memory is under way")
    one_left = error_of(f"{COPY}    cp.async.wait_group 1;\n{read}", source, inside=BUFFER)
    check(one_left, FAILED, "read before wait_group")
    check(
        error_of(f"{COPY}    st.shared.b64 [%r6], %d0;", source, inside=BUFFER),
        FAILED,
        "written before wait_group",
    )
    for wait in ("wait_group 0", "wait_all"):
        run(kernel(f"{COPY}    cp.async.{wait};\n{read}", inside=BUFFER), out, source)
        assert out.tolist() == list(range(32))


def test_a_copy_that_was_not_committed_is_of_no_group() -> None:
    source = words(range(64))
    uncommitted = COPY.replace("    cp.async.commit_group;\n", "")
    read = "    ld.shared.b64 %d6, [%r6];"
    error = error_of(f"{uncommitted}    cp.async.wait_group 0;\n{read}", source, inside=BUFFER)
    check(error, FAILED, "read before wait_group")
    run(
        kernel(f"{uncommitted}    cp.async.wait_all;\n{read}", inside=BUFFER),
        words([0] * 32),
        source,
    )


def test_other_warps_see_a_copy_after_a_barrier() -> None:
    source = words(range(64))
    other = "    xor.b32 %r7, %r6, 256;\n    ld.shared.b64 %d6, [%r7];"
    waited = f"{COPY}    cp.async.wait_group 0;\n"
    run(
        kernel(f"{waited}    bar.sync 0;\n{other}", inside=BUFFER),
        words([0] * 64),
        source,
        block=64,
    )
    swapped = f"{COPY}    bar.sync 0;\n    cp.async.wait_group 0;\n{other}"
    error = error_of(swapped, source, inside=BUFFER, block=64)
    check(error, FAILED, "read before wait_group: a copy to 0x100")


def test_a_copy_is_into_memory_that_no_other_warp_reads() -> None:
    source = words(range(64))
    body = f"""{SHARED}
    st.shared.b64 [%r6], %d0;
    bar.sync 0;
    setp.lt.u32 %p1, %r0, 32;
    @%p1 ld.shared.b64 %d6, [%r6+256];
    {COPY.replace(SHARED, "")}"""
    error = error_of(body, source, inside=BUFFER, block=64)
    check(error, FAILED, "another warp read 0x100 of shared memory", "cp.async.ca.shared.global")


@pytest.mark.parametrize(
    ("copy", "code", "words_of_it"),
    [
        ("cp.async.cg.shared.global [%r6], [%d11], 16", MISALIGNED, "16 bytes at 0x8 of shared"),
        ("cp.async.ca.shared.global [%r4], [%d11+4], 8", MISALIGNED, "8 bytes at"),
        ("cp.async.ca.shared.global [%r4], [%d11+1024], 8", ILLEGAL, "are in no range"),
        ("cp.async.ca.shared.global [%r4], [%d11], 8, 9", FAILED, "a copy of 8 bytes reads 9"),
    ],
)
def test_a_copy_is_an_access_as_others(copy: str, code: int, words_of_it: str) -> None:
    source = words([0] * 32)
    body = f"{SHARED}    setp.eq.s32 %p1, %r0, 1;\n    @%p1 {copy};"
    check(error_of(body, source, inside=BUFFER), code, words_of_it)


def test_a_copy_that_reads_nothing_reaches_no_memory() -> None:
    body = f"""{SHARED}
    cp.async.ca.shared.global [%r6], [%d11], 8, 0;
    cp.async.wait_all;
    ld.shared.b64 %d6, [%r6];
    st.global.b64 [%d14], %d6;"""
    out = words([7] * 32)
    counted = run(kernel(body, inside=BUFFER), out)  # %d11 is 0
    assert out.tolist() == [0] * 32
    assert counted.bytes_read == 0


def test_a_barrier_that_not_all_warps_reach() -> None:
    body = """
    setp.lt.u32 %p1, %r0, 32;
    @%p1 bra DONE;
    bar.sync 0;
DONE:"""
    error = error_of(body, block=96)
    check(error, FAILED, "barrier 0 is not reached by all of 96 threads: 1 of 3 warps have ended")
    check(error, FAILED, "`bar.sync 0`", "warp 1")


def test_a_barrier_that_not_all_lanes_reach() -> None:
    body = """
    setp.lt.u32 %p1, %r0, 5;
    @%p1 bar.sync 0;"""
    check(error_of(body), FAILED, "lanes 0xffffffe0 of warp 0 are not at the barrier")


def test_a_barrier_of_some_warps() -> None:
    body = """
    setp.ge.u32 %p1, %r0, 64;
    @%p1 bra DONE;
    bar.sync 1, 64;
DONE:
    st.global.b64 [%d14], %d0;"""
    out = words([1] * 96)
    run(kernel(body), out, block=96)
    assert out.tolist() == [8 * i for i in range(96)]
    check(error_of(body.replace(", 64;\nDONE", ", 96;\nDONE"), block=96), FAILED, "of 96 threads")
    check(error_of("    bar.sync 0, 33;"), FAILED, "no barrier 0 of 33 threads")


def test_lanes_that_others_wait_for() -> None:
    body = """
    setp.lt.u32 %p1, %r0, 16;
    @%p1 shfl.sync.idx.b32 %r5, %r0, 3, 31, MASK;"""
    run(kernel(body.replace("MASK", "0xffff")), words([0] * 32))
    error = error_of(body.replace("MASK", "-1"))
    check(error, FAILED, "lanes 0xffff0000 of the mask 0xffffffff are not here")
    error = error_of(body.replace("MASK", "0xff"))
    check(error, FAILED, "the lane is not in its own mask 0xff", "thread (8, 0, 0)")
    error = error_of(body.replace("MASK", "0xffff").replace(", 3, 31", ", 20, 31"))
    check(error, FAILED, "lane 20, whose value is taken, is not here")


def test_a_kernel_that_traps_or_never_ends() -> None:
    trap = "    setp.eq.s32 %p1, %r0, 3;\n    @%p1 trap;"
    check(error_of(trap), FAILED, "the kernel traps", "thread (3, 0, 0)")
    check(error_of("AGAIN:\n    bra AGAIN;"), FAILED, "the kernel does not end")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.replace("ret;", "add.f32 %r1, %r1, %r1;"), "add.f32 is not known"),
        (lambda t: t.replace("ret;", "atom.global.xor.b32 %r1, [%d0], 1;"), "atom.global.xor.b32"),
        (lambda t: t.replace("ret;", "ld.global.b64.wrong %d1, [%d0];"), "is not known"),
        (lambda t: t.replace("ret;", "add.s32 %r1, %r1;"), "wrong number of operands"),
        (lambda t: t.replace("ret;", "add.s32 %r99, %r1, %r1;"), "%r99 is no register"),
        (lambda t: t.replace("ret;", "add.s32 4, %r1, %r1;"), "expected registers to write"),
        (lambda t: t.replace("ret;", "bra NOWHERE;"), "there is no such label"),
        (lambda t: t.replace("ret;", "@%r1 ret;"), "%r1 is no predicate"),
        (lambda t: t.replace("ret;", "ld.global.v4.b64 {%d1,%d2,%d3,%d4}, [%d0];"), "not known"),
        (lambda t: t.replace("ret;", "ld.param.b64 %d1, [param_c+8];"), "within the parameters"),
        (lambda t: t.replace("ret;", "cp.async.cg.shared.global [%r1], [%d0], 8;"), "16 bytes"),
        (lambda t: t.replace("ret;", "mov.b64 %d1, {%r1, %r1, %r1};"), "wrong number of parts"),
        (lambda t: t.replace("ret;", "add.s32 %r1, %r1, %r1"), "expected ;"),
        (lambda t: t.replace("ret;", "selp.b32 %r1, 1, 0, !%p1;"), "no negated operand"),
        (lambda t: t.replace("%r<20>", "%r<99999>"), "more than 65536 registers"),
        (lambda t: ".shared .b8 a[200000];\n.shared .b8 b[99999];\n" + t, "more than 232448 bytes"),
        (lambda t: ".shared .align 3 .b8 a[8];\n" + t, "alignment that no CTA has"),
        (lambda t: ".shared .b8 a[99999999999];\n" + t, "a size or alignment"),
        (lambda t: t.replace("}\n", ""), "the body of kernel does not end"),
        (lambda t: ".func other;\n" + t, ".func is not known"),
    ],
)
def test_text_that_is_not_known(change: Callable[[str], str], reason: str) -> None:
    text = text_of("    mov.b32 %r1, 0;")
    Module(text)
    with pytest.raises(ValueError, match=rf"line \d+: .*{re.escape(reason)}"):
        Module(change(text))


def test_the_line_of_what_is_not_known() -> None:
    with pytest.raises(ValueError, match=f"line {BODY_LINE}: the instruction sin.approx.f32"):
        Module(text_of("    @%p1 sin.approx.f32 %r1, %r2;"))


def test_a_module_has_no_other_kernels() -> None:
    with pytest.raises(KeyError):
        Module(text_of("")).function("other")


@pytest.mark.parametrize(
    ("grid", "block", "shared", "reason"),
    [
        ((0, 1, 1), 32, 0, "a grid without CTAs"),
        ((1, 1, 1), 0, 0, "a CTA has 1 to 1024 threads"),
        ((1, 1, 1), (32, 33, 1), 0, "a CTA has 1 to 1024 threads"),
        ((1, 1, 1), 32, 227 * 1024 + 1, "more shared memory than a CTA can have"),
    ],
)
def test_launches_that_no_card_takes(
    grid: tuple[int, int, int], block: int | tuple[int, int, int], shared: int, reason: str
) -> None:
    with pytest.raises(LaunchError, match=reason) as caught:
        kernel("").launch(grid, [0] * 4, block=block, shared_bytes=shared)
    assert caught.value.code == INVALID


def test_a_kernel_is_launched_with_the_threads_that_it_was_compiled_for() -> None:
    exactly = Module(text_of("").replace(")\n{", ")\n.reqntid 64\n{")).function("kernel")
    assert exactly.threads == 64
    exactly.launch(1, [0] * 4)
    with pytest.raises(LaunchError, match="a CTA of other threads"):
        exactly.launch(1, [0] * 4, block=32)
    at_most = Module(text_of("").replace(")\n{", ")\n.maxntid 64, 2\n{")).function("kernel")
    at_most.launch(1, [0] * 4, block=32)
    with pytest.raises(LaunchError, match="a CTA of other threads"):
        at_most.launch(1, [0] * 4, block=160)


def test_kernels_of_a_module_have_shared_memory_of_their_own() -> None:
    first = text_of("    mov.b32 %r4, mine;", inside=".shared .align 16 .b8 mine[64];")
    second = text_of("    mov.b32 %r4, mine;", inside=".shared .align 16 .b8 mine[32];")
    body = second[second.index(".visible") :].replace(" kernel(", " other(")
    module = Module(".shared .align 4 .b32 of_all;\n" + first + body)
    assert module.function("kernel").static_shared_bytes == 16 + 64
    assert module.function("other").static_shared_bytes == 16 + 32
