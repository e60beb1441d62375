"""The imitated card computes what PTX says: every instruction against Python's integers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
from card.build import NO_COMPILER, compiler
from card.machine import Memory
from ptx_text import compute, kernel, run, words

pytestmark = pytest.mark.skipif(compiler() is None, reason=NO_COMPILER)

REGISTERS = {16: "%h", 32: "%r", 64: "%d"}
TYPES = ("u16", "s16", "u32", "s32", "u64", "s64")
RANDOM = random.Random(1)
EDGES = [0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 127, 128, 255, 0x7FFF, 0x8000, 0xFFFF]
EDGES += [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1]
VALUES = EDGES + [RANDOM.getrandbits(64) for _ in range(8)]
PAIRS = list(itertools.product(VALUES, VALUES))
SHIFTS = [0, 1, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 200]
FIELDS = list(itertools.product([0, 1, 5, 15, 31, 32, 63, 64, 255], [0, 1, 7, 16, 31, 32, 64, 255]))


def as_type(value: int, name: str) -> int:
    """As the type reads it: `s16` of 0xFFFF is -1."""
    bits = int(name[1:])
    value %= 2**bits
    return value - 2**bits if name[0] == "s" and value >> (bits - 1) else value


def result_of(
    opcode: str, name: str, *sources: list[int], words_from: int = 3, bits: int = 0
) -> list[int]:
    """What an instruction of this type makes of each row; from source `words_from` on, they are
    32-bit numbers. `bits`: of its result, where not of its type."""
    width = int(name[1:])
    bits = bits or width
    operands = [f"{REGISTERS[width if i < words_from else 32]}{i + 1}" for i in range(len(sources))]
    result = f"{REGISTERS[bits]}9"
    body = f"    {opcode} {', '.join([result, *operands])};\n"
    if bits < 64:
        body += f"    cvt.u64.u{bits} %d9, {result};\n"
    return compute(body, *sources)


def quotient(a: int, b: int) -> int:
    """Towards 0, as machines divide."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": quotient,
    "rem": lambda a, b: a - b * quotient(a, b),
}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("opcode", BINARY)
def test_arithmetic(opcode: str, name: str) -> None:
    bits = int(name[1:])
    divides = opcode in ("div", "rem")
    pairs = [(a, b) for a, b in PAIRS if not (divides and b % 2**bits == 0)]
    got = result_of(f"{opcode}.{name}", name, *map(list, zip(*pairs, strict=True)))
    wanted = [BINARY[opcode](as_type(a, name), as_type(b, name)) % 2**bits for a, b in pairs]
    assert got == wanted


@pytest.mark.parametrize("name", TYPES)
def test_high_and_wide_products(name: str) -> None:
    bits = int(name[1:])
    columns = [list(column) for column in zip(*PAIRS, strict=True)]
    products = [as_type(a, name) * as_type(b, name) for a, b in PAIRS]
    got = result_of(f"mul.hi.{name}", name, *columns)
    assert got == [(product >> bits) % 2**bits for product in products]
    if bits < 64:
        got = result_of(f"mul.wide.{name}", name, *columns, bits=2 * bits)
        assert got == [product % 4**bits for product in products]


@pytest.mark.parametrize("name", TYPES)
def test_multiply_and_add(name: str) -> None:
    bits = int(name[1:])
    thirds = [RANDOM.getrandbits(64) for _ in PAIRS]
    columns = [[a for a, _ in PAIRS], [b for _, b in PAIRS], thirds]
    rows = [tuple(as_type(value, name) for value in row) for row in zip(*columns, strict=True)]
    got = result_of(f"mad.lo.{name}", name, *columns)
    assert got == [(a * b + c) % 2**bits for a, b, c in rows]
    got = result_of(f"mad.hi.{name}", name, *columns)
    assert got == [((a * b >> bits) + c) % 2**bits for a, b, c in rows]
    if bits == 32:  # the third is as wide as the result
        got = compute(f"    mad.wide.{name} %d9, %r1, %r2, %d3;", *columns)
        wide = [(a * b + c) % 2**64 for (a, b, _), c in zip(rows, thirds, strict=True)]
        assert got == wide


@pytest.mark.parametrize("name", TYPES)
def test_shifts(name: str) -> None:
    bits = int(name[1:])
    pairs = list(itertools.product(VALUES, SHIFTS))
    columns = [list(column) for column in zip(*pairs, strict=True)]
    got = result_of(f"shr.{name}", name, *columns, words_from=1)
    assert got == [(as_type(a, name) >> by) % 2**bits for a, by in pairs]
    got = result_of(f"shl.b{bits}", name, *columns, words_from=1)
    assert got == [(as_type(a, name) << by) % 2**bits for a, by in pairs]


@pytest.mark.parametrize("side", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shifts(side: str, mode: str) -> None:
    rows = [(a, b, by) for (a, b), by in itertools.product(PAIRS[::7], SHIFTS)]
    got = result_of(f"shf.{side}.{mode}.b32", "b32", *map(list, zip(*rows, strict=True)))
    wanted = []
    for low, high, by in rows:
        both = high % 2**32 << 32 | low % 2**32
        by = by % 32 if mode == "wrap" else min(by, 32)
        wanted.append((both << by >> 32 if side == "l" else both >> by) % 2**32)
    assert got == wanted


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_bits_of_two(bits: int) -> None:
    columns = [list(column) for column in zip(*PAIRS, strict=True)]
    for opcode in ("and", "or", "xor"):
        got = result_of(f"{opcode}.b{bits}", f"b{bits}", *columns)
        apply = {"and": int.__and__, "or": int.__or__, "xor": int.__xor__}[opcode]
        assert got == [apply(a, b) % 2**bits for a, b in PAIRS]


@pytest.mark.parametrize("bits", [32, 64])
def test_bits_of_one(bits: int) -> None:
    name = f"b{bits}"
    cut = [value % 2**bits for value in VALUES]
    digits = [f"{value:0{bits}b}" for value in cut]
    assert result_of(f"not.{name}", name, VALUES) == [value ^ (2**bits - 1) for value in cut]
    assert result_of(f"cnot.{name}", name, VALUES) == [int(value == 0) for value in cut]
    assert result_of(f"brev.{name}", name, VALUES) == [int(text[::-1], 2) for text in digits]
    assert result_of(f"popc.{name}", name, VALUES, bits=32) == [t.count("1") for t in digits]
    leading = [bits - value.bit_length() for value in cut]
    assert result_of(f"clz.{name}", name, VALUES, bits=32) == leading
    highest = [(value.bit_length() - 1) % 2**32 for value in cut]
    assert result_of(f"bfind.u{bits}", name, VALUES, bits=32) == highest
    signed = [as_type(value, f"s{bits}") for value in VALUES]
    other = [((v if v >= 0 else ~v).bit_length() - 1) % 2**32 for v in signed]
    assert result_of(f"bfind.s{bits}", name, VALUES, bits=32) == other
    assert result_of(f"neg.s{bits}", name, VALUES) == [-v % 2**bits for v in signed]
    assert result_of(f"abs.s{bits}", name, VALUES) == [abs(v) % 2**bits for v in signed]


def bits_of(value: int, bits: int) -> list[int]:
    return [value >> i & 1 for i in range(bits)]


def number(digits: list[int]) -> int:
    return sum(bit << i for i, bit in enumerate(digits))


@pytest.mark.parametrize("name", ["u32", "s32", "u64", "s64"])
def test_fields_of_bits(name: str) -> None:
    width = int(name[1:])
    rows = [(value, *field) for value in VALUES[::3] for field in FIELDS]
    columns = [list(column) for column in zip(*rows, strict=True)]
    got = result_of(f"bfe.{name}", name, *columns, words_from=1)
    wanted = []
    for value, first, count in rows:
        bits = bits_of(value, width)
        sign = bits[min(first + count - 1, width - 1)] if name[0] == "s" and count else 0
        at = range(first, first + width)
        wanted.append(number([bits[j] if j < min(first + count, width) else sign for j in at]))
    assert got == wanted


@pytest.mark.parametrize("bits", [32, 64])
def test_a_field_is_put_in(bits: int) -> None:
    register = REGISTERS[bits]
    for first, count in FIELDS:
        columns = [[a for a, _ in PAIRS[::9]], [b for _, b in PAIRS[::9]]]
        body = f"    bfi.b{bits} {register}9, {register}1, {register}2, {first}, {count};\n"
        got = compute(body + (f"    cvt.u64.u32 %d9, {register}9;" if bits == 32 else ""), *columns)
        wanted = []
        for a, b in PAIRS[::9]:
            made, put = bits_of(b, bits), bits_of(a, bits)
            for i in range(count):
                if first + i < bits:
                    made[first + i] = put[i]
            wanted.append(number(made))
        assert got == wanted


def test_bytes_are_permuted() -> None:
    rows = [(a, b, RANDOM.getrandbits(16)) for a, b in PAIRS]
    got = result_of("prmt.b32", "b32", *map(list, zip(*rows, strict=True)))
    wanted = []
    for a, b, selector in rows:
        source = (a % 2**32).to_bytes(4, "little") + (b % 2**32).to_bytes(4, "little")
        made = []
        for i in range(4):
            choice = selector >> 4 * i & 15
            byte = source[choice & 7]
            made.append((255 if byte & 128 else 0) if choice & 8 else byte)
        wanted.append(int.from_bytes(made, "little"))
    assert got == wanted


@pytest.mark.parametrize("table", [0xE8, 0x96, 0x80, 0xFE, 0x1B])
def test_three_are_looked_up_in_a_table(table: int) -> None:
    rows = [(a, b, RANDOM.getrandbits(32)) for a, b in PAIRS[::5]]
    columns = [list(column) for column in zip(*rows, strict=True)]
    body = f"    lop3.b32 %r9, %r1, %r2, %r3, {table};\n    cvt.u64.u32 %d9, %r9;"
    got = compute(body, *columns)
    wanted = [
        number(
            [
                table >> (4 * x + 2 * y + z) & 1
                for x, y, z in zip(*(bits_of(value, 32) for value in row), strict=True)
            ]
        )
        for row in rows
    ]
    assert got == wanted


COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": int.__eq__,
    "ne": int.__ne__,
    "lt": int.__lt__,
    "le": int.__le__,
    "gt": int.__gt__,
    "ge": int.__ge__,
}


@pytest.mark.parametrize("name", TYPES)
def test_comparisons(name: str) -> None:
    register = REGISTERS[int(name[1:])]
    columns = [list(column) for column in zip(*PAIRS, strict=True)]
    unsigned = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"} if name[0] == "u" else {}
    for compared in (*COMPARISONS, *unsigned):
        body = f"    setp.{compared}.{name} %p9, {register}1, {register}2;\n"
        got = compute(body + "    selp.b64 %d9, 1, 0, %p9;", *columns)
        holds = COMPARISONS[unsigned.get(compared, compared)]
        assert got == [int(holds(as_type(a, name), as_type(b, name))) for a, b in PAIRS]


@pytest.mark.parametrize("combined", ["and", "or", "xor"])
@pytest.mark.parametrize("negated", [False, True], ids=["as it is", "negated"])
def test_a_comparison_is_combined_with_a_predicate(combined: str, negated: bool) -> None:
    rows = [(a, b, c) for a, b, c in itertools.product([1, 2, 3], [2, 3], [0, 1])]
    columns = [list(column) for column in zip(*rows, strict=True)]
    third = "!%p3" if negated else "%p3"
    body = f"""
    setp.lt.{combined}.s32 %p8|%p9, %r1, %r2, {third};
    selp.b32 %r8, 1, 0, %p8;
    selp.b32 %r9, 1, 0, %p9;
    mov.b64 %d9, {{%r8, %r9}};"""
    apply = {"and": bool.__and__, "or": bool.__or__, "xor": bool.__xor__}[combined]
    wanted = []
    for a, b, c in rows:
        with_c = bool(c) != negated
        wanted.append(int(apply(a < b, with_c)) | int(apply(a >= b, with_c)) << 32)
    assert compute(body, *columns) == wanted


def test_predicates() -> None:
    rows = list(itertools.product([0, 1], [0, 1]))
    columns = [list(column) for column in zip(*rows, strict=True)]
    for opcode, apply in (("and", int.__and__), ("or", int.__or__), ("xor", int.__xor__)):
        body = f"    {opcode}.pred %p9, %p1, %p2;\n    selp.b64 %d9, 1, 0, %p9;"
        assert compute(body, *columns) == [apply(a, b) for a, b in rows]
    body = "    not.pred %p8, %p1;\n    mov.pred %p9, %p8;\n    selp.b64 %d9, 1, 0, %p9;"
    assert compute(body, [0, 1]) == [1, 0]


@pytest.mark.parametrize("source", ["u8", "s8", *TYPES])
@pytest.mark.parametrize("result", ["u8", "s8", *TYPES])
def test_conversions(result: str, source: str) -> None:
    into, out_of = (REGISTERS[max(16, int(name[1:]))] for name in (result, source))
    bits = max(16, int(result[1:]))
    body = f"    cvt.{result}.{source} {into}9, {out_of}1;\n"
    got = compute(body + (f"    cvt.u64.u{bits} %d9, {into}9;" if bits < 64 else ""), VALUES)
    wanted = [as_type(as_type(value, source), result) % 2**bits for value in VALUES]
    assert got == wanted


def test_parts_of_a_number() -> None:
    body = """
    mov.b64 {%r4, %r5}, %d1;
    mov.b32 {_, %h4}, %r4;
    mov.b32 {%h5, _}, %r5;
    mov.b32 %r6, {%h4, %h5};
    mov.b64 %d9, {%r6, %r5};"""
    wanted = [(v >> 16 & 0xFFFF) | (v >> 32 & 0xFFFF) << 16 | v >> 32 << 32 for v in VALUES]
    assert compute(body, VALUES) == wanted
    assert compute("    mov.b64 {%h4, %h5, %h6, %h7}, %d1;\n    cvt.u64.u16 %d9, %h7;", VALUES) == [
        value >> 48 for value in VALUES
    ]


def test_constants() -> None:
    for written, value in (("-5", -5), ("0x1F", 31), ("7U", 7), ("21474836480", 21474836480)):
        assert compute(f"    mov.s64 %d9, {written};", [0]) == [value % 2**64]
    assert compute("    mov.u32 %r9, WARP_SZ;\n    cvt.u64.u32 %d9, %r9;", [0]) == [32]


def test_registers_within_braces_are_others() -> None:
    body = """
    mov.b32 %r9, 1;
    {
    .reg .b32 %r<12>, inner;
    mov.b32 %r9, 7;
    mov.b32 inner, %r9;
    cvt.u64.u32 %d8, inner;
    }
    cvt.u64.u32 %d9, %r9;
    add.s64 %d9, %d9, %d8;"""
    assert compute(body, [0]) == [8]


def test_special_registers() -> None:
    names = ["tid.x", "tid.y", "tid.z", "ntid.y", "nctaid.x", "ctaid.y", "laneid", "warpid"]
    names += ["nwarpid", "lanemask_lt", "lanemask_eq", "lanemask_le", "lanemask_gt", "lanemask_ge"]
    body = "    mov.u32 %r1, %tid.y;\n    mad.lo.s32 %r2, %r1, 8, %r12;\n"
    body += "    mov.u32 %r3, %tid.z;\n    mad.lo.s32 %r2, %r3, 40, %r2;\n"
    body += f"    mul.wide.u32 %d1, %r2, {4 * len(names)};\n    add.s64 %d1, %d1, %d10;\n"
    for i, name in enumerate(names):
        body += f"    mov.u32 %r4, %{name};\n    st.global.b32 [%d1+{4 * i}], %r4;\n"
    out = np.zeros((80, len(names)), dtype=np.uint32)
    function = kernel(body)
    with Memory() as memory:
        memory.add(out.ctypes.data, out.nbytes)
        function.launch((1, 1), [out.ctypes.data, 0, 0, 0], block=(8, 5, 2))
    for thread, row in enumerate(out.tolist()):
        x, y, z, lane = thread % 8, thread // 8 % 5, thread // 40, thread % 32
        masks = [2**lane - 1, 2**lane, 2 ** (lane + 1) - 1]
        masks += [2**32 - 2 ** (lane + 1), 2**32 - 2**lane]
        assert row == [x, y, z, 5, 1, 0, lane, thread // 32, 3, *masks]


@pytest.mark.parametrize(
    ("bits", "elements"),
    [(bits, n) for bits in (8, 16, 32, 64) for n in (1, 2, 4) if bits * n <= 128],
)
def test_loads_and_stores_of_every_width(bits: int, elements: int) -> None:
    size = bits // 8 * elements
    register = REGISTERS[max(bits, 16)]
    vector = f".v{elements}" if elements > 1 else ""
    values = "{" + ", ".join(f"{register}{1 + i}" for i in range(elements)) + "}"
    body = f"""
    mul.wide.u32 %d5, %r0, {size};
    add.s64 %d6, %d11, %d5;
    add.s64 %d7, %d10, %d5;
    ld.global.cg{vector}.b{bits} {values}, [ %d6 + 0 ];
    st.global{vector}.b{bits} [%d7+{size}], {values};"""
    source = np.frombuffer(RANDOM.randbytes(64 * size), dtype=np.uint8).copy()
    out = np.full(65 * size, 0xA5, dtype=np.uint8)
    counted = run(kernel(body), out, source, block=64)
    assert (out[size:] == source).all()
    assert (out[:size] == 0xA5).all()
    assert counted.accesses_by_width == {w: 128 * (w == size) for w in (1, 2, 4, 8, 16)}


@pytest.mark.parametrize("name", ["u8", "s8", "u16", "s16", "s32"])
def test_a_load_extends_what_is_narrower_than_its_register(name: str) -> None:
    body = f"    ld.global.{name} %d9, [%d15];\n    st.global.b64 [%d14], %d9;"
    source = words(VALUES)
    out = words([0] * 32)
    run(kernel(body, sources=True), out, source, source.copy(), source.copy())
    assert out.tolist() == [as_type(value, name) % 2**64 for value in VALUES]


def test_lanes_that_part_meet_again() -> None:
    """Steps of the Collatz sequence, a loop that ends elsewhere for every lane, with two ways."""
    body = """
    mov.b64 %d9, 0;
NEXT:
    setp.le.u64 %p4, %d1, 1;
    @%p4 bra DONE;
    and.b64 %d4, %d1, 1;
    setp.eq.b64 %p5, %d4, 0;
    @!%p5 bra ODD;
    shr.u64 %d1, %d1, 1;
    bra JOIN;
ODD:
    mad.lo.u64 %d1, %d1, 3, 1;
JOIN:
    add.s64 %d9, %d9, 1;
    bra.uni NEXT;
DONE:
    activemask.b32 %r4;
    cvt.u64.u32 %d5, %r4;
    shl.b64 %d5, %d5, 32;
    or.b64 %d9, %d9, %d5;"""

    def steps(value: int) -> int:
        count = 0
        while value > 1:
            value = value // 2 if value % 2 == 0 else 3 * value + 1
            count += 1
        return count

    starts = list(range(1, 33))
    everybody = 2**32 - 1
    assert compute(body, starts) == [steps(v) | everybody << 32 for v in starts]


def test_a_lane_that_ends_leaves_the_others() -> None:
    body = """
    setp.lt.u32 %p4, %r0, 5;
    @%p4 ret;
    st.global.b64 [%d14], 7;"""
    out = words([1] * 32)
    run(kernel(body), out)
    assert out.tolist() == [1] * 5 + [7] * 27


def test_a_guard_holds_back_lanes() -> None:
    body = """
    mov.b64 %d9, 1;
    @%p1 mov.b64 %d9, 2;
    @!%p2 add.s64 %d9, %d9, 10;"""
    rows = list(itertools.product([0, 1], [0, 1]))
    columns = [list(column) for column in zip(*rows, strict=True)]
    assert compute(body, *columns) == [(2 if a else 1) + (0 if b else 10) for a, b in rows]


def test_warps_exchange_through_shared_memory() -> None:
    body = """
    mov.b32 %r4, buffer;
    shl.b32 %r5, %r0, 4;
    add.s32 %r6, %r4, %r5;
    cvt.u64.u32 %d4, %r0;
    st.shared.v2.b64 [%r6], {%d4, %d0};
    bar.sync 0;
    xor.b32 %r7, %r5, 1008;
    add.s32 %r7, %r7, %r4;
    ld.shared.b64 %d5, [%r7+8];
    st.global.b64 [%d14], %d5;"""
    out = words([0] * 64)
    static = ".shared .align 16 .b8 buffer[1024];"
    counted = run(kernel(body, inside=static), out, block=64)
    assert out.tolist() == [8 * (thread ^ 63) for thread in range(64)]
    assert counted.barriers == 1
    out[:] = 0
    dynamic = ".extern .shared .align 16 .b8 buffer[];"
    behind = ".shared .align 4 .b32 first;\n"
    run(kernel(body, outside=behind + dynamic), out, block=64, shared_bytes=1024)
    assert out.tolist() == [8 * (thread ^ 63) for thread in range(64)]


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "source"),
    [
        ("idx", 3, 31, lambda lane: (3, 1)),
        ("idx", 3, 31 | 24 << 8, lambda lane: (lane // 8 * 8 + 3, 1)),
        ("up", 5, 0, lambda lane: (lane - 5, 1) if lane >= 5 else (lane, 0)),
        ("down", 5, 31, lambda lane: (lane + 5, 1) if lane + 5 <= 31 else (lane, 0)),
        ("down", 5, 31 | 16 << 8, lambda lane: (lane + 5, 1) if lane % 16 <= 10 else (lane, 0)),
        ("bfly", 9, 31, lambda lane: (lane ^ 9, 1)),
    ],
)
def test_lanes_pass_on_values(
    mode: str, by: int, clamp: int, source: Callable[[int], tuple[int, int]]
) -> None:
    body = f"""
    shfl.sync.{mode}.b32 %r9|%p9, %r1, {by}, {clamp}, -1;
    selp.b32 %r8, 1, 0, %p9;
    mov.b64 %d9, {{%r9, %r8}};"""
    got = compute(body, [100 + lane for lane in range(32)])
    wanted = [source(lane) for lane in range(32)]
    assert got == [100 + lane | within << 32 for lane, within in wanted]


def test_lanes_vote() -> None:
    chosen = [lane % 3 for lane in range(32)]
    ballot = sum(1 << lane for lane in range(32) if chosen[lane])
    text = "    vote.sync.ballot.b32 %r9, %p1, -1;\n    cvt.u64.u32 %d9, %r9;"
    assert compute(text, chosen) == [ballot] * 32
    for mode, wanted in (("any", 1), ("all", 0), ("uni", 0)):
        text = f"    vote.sync.{mode}.pred %p9, %p1, -1;\n    selp.b64 %d9, 1, 0, %p9;"
        assert compute(text, chosen) == [wanted] * 32


def test_a_copy_lands_where_it_is_waited_for() -> None:
    """Two groups; of the second, every other thread reads half, and the rest becomes 0."""
    body = """
    mov.b32 %r4, buffer;
    shl.b32 %r5, %r0, 4;
    add.s32 %r6, %r4, %r5;
    mul.wide.u32 %d4, %r0, 16;
    add.s64 %d5, %d11, %d4;
    cp.async.cg.shared.global [ %r6 + 0 ], [ %d5 + 0 ], 0x10;
    cp.async.commit_group;
    and.b32 %r7, %r0, 1;
    shl.b32 %r7, %r7, 3;
    cp.async.ca.shared.global [%r6+512], [%d5+512], 8, %r7;
    cp.async.commit_group;
    cp.async.wait_group 1;
    ld.shared.v2.b64 {%d6, %d7}, [%r6];
    cp.async.wait_group 0;
    ld.shared.b64 %d8, [%r6+512];
    add.s64 %d9, %d6, %d7;
    add.s64 %d9, %d9, %d8;
    st.global.b64 [%d14], %d9;"""
    source = words([RANDOM.getrandbits(40) for _ in range(128)])
    out = words([0] * 32)
    inside = ".shared .align 16 .b8 buffer[1024];"
    counted = run(kernel(body, inside=inside), out, source)
    values = source.tolist()
    assert out.tolist() == [
        values[2 * i] + values[2 * i + 1] + (values[64 + 2 * i] if i % 2 else 0) for i in range(32)
    ]
    assert counted.bytes_read == 512 + 16 * 8
    assert counted.accesses_by_width == {1: 0, 2: 0, 4: 0, 8: 16 + 32, 16: 32}
