"""The kernels that Triton compiled, executed: PTX for each target, byte for byte.

A kernel can read the pages that it is to move, its ids and its strips, and no other byte; what it
writes is compared over whole storages. An access that hardware would refuse is an error.
"""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from card.build import NO_COMPILER, compiler
from card.kernels import move_pages
from card.machine import Counters, Kind
from kernel_code import CLASSES, TARGETS
from page_cases import CASES, SMALL, Case, Tensor, check, noise

from triton_offload.kernels.table import PageTable
from triton_offload.kernels.tiling import KernelConfig, choose_config

pytestmark = pytest.mark.skipif(compiler() is None, reason=NO_COMPILER)

ROOT = Path(__file__).resolve().parent.parent
TRITON_36 = Path(os.environ.get("TRITON_36_PATH", ROOT / ".venv" / "triton-3.6"))
NVIDIA = [name for name in TARGETS if name.startswith("sm_")]
DIRECTIONS = ("gather", "scatter")

# Few tables, since each makes kernels of its own, and compiling takes longer than all else.
TABLES = (
    (Tensor(64), Tensor(64, 64)),
    (Tensor(2048), Tensor(512, 16)),
    (Tensor(1152), Tensor(48)),
    (Tensor(64, 8), Tensor(40, 0, 8)),
    (Tensor(36), Tensor(64, 4)),
    (Tensor(6), Tensor(62, 2)),
    (Tensor(33, 1), Tensor(577, 3)),
    (Tensor(1, 1),),
    (Tensor(64), Tensor(24), Tensor(4), Tensor(6), Tensor(1)),
)
#: bytes between slots and before the first
PLACES = ((0, 0), (8, 8), (1, 0))
SEEDS, BATCH = 500, 100


def on(target: str, slots_in: Kind = Kind.DEVICE) -> Callable[..., list[Counters]]:
    return functools.partial(move_pages, TARGETS[target], slots_in=slots_in)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("target", NVIDIA)
def test_moves_these_bytes_and_no_other(target: str, direction: str) -> None:
    for case in CASES.values():
        check(case, direction, on(target))


@pytest.mark.parametrize("zero_copy", [False, True], ids=["staged", "zero_copy"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("target", NVIDIA)
def test_moves_the_same_bytes_in_full_size_tiles(
    target: str, direction: str, zero_copy: bool
) -> None:
    config = choose_config(zero_copy=zero_copy)
    move = on(target, Kind.PINNED if zero_copy else Kind.DEVICE)
    check(CASES["pages of several strips"], direction, move, config)
    check(CASES["a different alignment each"], direction, move, config)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("target", NVIDIA)
def test_moves_pages_of_every_class(target: str, name: str, direction: str) -> None:
    zero_copy, page_bytes, alignment, *_ = CLASSES[name]
    slot_bytes = 2 * page_bytes
    case = Case(
        (Tensor(page_bytes),),
        (4, 0, 3),
        blocks_per_chunk=2,
        first_block=1,
        slot_ids=(2, 0),
        num_blocks=5,
        num_slots=3,
        slot_gap=-slot_bytes % 16 + alignment % 16,
    )
    move = on(target, Kind.PINNED if zero_copy else Kind.DEVICE)
    check(case, direction, move, choose_config(zero_copy=zero_copy))


def generated(seed: int, direction: str) -> Case:
    rng = random.Random(seed)
    blocks_per_chunk = rng.randint(1, 4)
    count = rng.randint(1, 7)
    first = rng.randint(0, 2 * blocks_per_chunk)
    num_chunks = -(-(first + count) // blocks_per_chunk)
    # What is written is written once; what is read may be read again.
    blocks, slots = range(7), range(9)
    gap, start = rng.choice(PLACES)
    distinct = direction == "gather"
    chosen = rng.sample(slots, num_chunks) if distinct else rng.choices(slots, k=num_chunks)
    return Case(
        rng.choice(TABLES),
        tuple(rng.choices(blocks, k=count) if distinct else rng.sample(blocks, count)),
        blocks_per_chunk,
        first,
        None if rng.random() < 0.3 and num_chunks <= 9 else tuple(chosen),
        num_slots=9,
        slot_gap=gap,
        slot_start=start,
    )


@pytest.mark.parametrize("first_seed", range(0, SEEDS, BATCH))
@pytest.mark.parametrize("target", NVIDIA)
def test_moves_generated_cases(target: str, first_seed: int) -> None:
    for seed in range(first_seed, first_seed + BATCH):
        for direction in DIRECTIONS:
            case = generated(seed, direction)
            try:
                check(case, direction, on(target))
            except Exception as error:
                error.add_note(f"seed {seed}, {direction}: {case}")
                raise


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("target", NVIDIA)
def test_reaches_pages_more_than_2_gib_apart(target: str, direction: str) -> None:
    stride = 2**31 + 48
    # Virtual memory: only the pages that are touched are ever backed.
    cache = torch.empty(2 * stride + 256, dtype=torch.uint8)
    pool = torch.empty(2 * stride + 256, dtype=torch.uint8)
    table = PageTable([cache.as_strided((3, 64), (stride, 1), 32)])
    slots = pool.as_strided((3, 64), (stride, 1), 32)
    near = [(memory, i) for memory in (cache, pool) for i in range(3)]
    for seed, (memory, i) in enumerate(near):
        memory[i * stride : i * stride + 128] = noise(64, seed)
    expected = [memory[i * stride : i * stride + 128].clone() for memory, i in near]
    on(target)(direction, table, [2, 0], slots, [1, 2], config=SMALL)
    for block, slot in ((2, 1), (0, 2)):
        source, destination = (block, 3 + slot) if direction == "gather" else (3 + slot, block)
        expected[destination][32:96] = expected[source][32:96]
    for (memory, i), wanted in zip(near, expected, strict=True):
        assert torch.equal(memory[i * stride : i * stride + 128], wanted)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_counts_what_a_launch_moves(direction: str) -> None:
    """Four pages of 1 KiB, 16 bytes a thread: what the kernel must come to, however it is cut."""
    pages = noise(8 * 1024, 1)[: 8 * 1024].view(8, 1024)
    slots = torch.zeros(4, 1024, dtype=torch.uint8)
    config = KernelConfig(warps=1, tile_bytes=1024, programs=2)
    move = on("sm_90", Kind.PINNED)
    (counted,) = move(
        direction, PageTable([pages]), [5, 0, 7, 2], slots, [3, 1, 0, 2], config=config
    )
    # A program reads ahead: the first one what the second begins with, too.
    ids, moved = 2 * 5 * 8, 4 * 1024
    assert counted.accesses_by_width[16] == 2 * moved // 16
    assert counted.bytes_written == moved
    if direction == "gather":
        assert counted.host_bytes_written == moved
        assert counted.host_bytes_read == ids
        assert counted.host_round_trips == 2  # of each program, the ids of two pages in turn
    else:
        assert counted.host_bytes_written == 0
        assert counted.host_bytes_read == ids + moved
        # And what the ids say where to find: the next ids are read while that is under way.
        assert counted.host_round_trips == 3
    assert counted.barriers == 0
    # 1 KiB of pages, and on top what is read of the table and of ids while that is under way.
    assert 1024 <= counted.most_bytes_in_flight <= 1024 + 5 * 8 + 2 * 8


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_moves_each_byte_once(direction: str) -> None:
    """Programs that begin within a group of tiles begin at its right strip."""
    sizes = (2048, 512, 1024)
    written = 0

    def move(*arguments: Any, **options: Any) -> None:
        nonlocal written
        written = sum(launch.bytes_written for launch in on("sm_90")(*arguments, **options))

    blocks = (4, 0, 3, 1, 6, 2, 5)  # in four groups, which three programs share
    check(Case(tuple(map(Tensor, sizes)), blocks, num_slots=7), direction, move)
    assert written == len(blocks) * sum(sizes)


@pytest.mark.parametrize(
    "target",
    [name if name == "sm_90" else pytest.param(name, marks=pytest.mark.deep) for name in NVIDIA],
)
@pytest.mark.skipif(not (TRITON_36 / "triton").is_dir(), reason=f"no triton in {TRITON_36}")
@pytest.mark.skipif(triton.__version__.startswith("3.6."), reason="this is triton 3.6")
def test_all_of_this_with_triton_36(target: str) -> None:
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), __file__]
    check = "import triton; assert triton.__version__.startswith('3.6.'), triton.__version__"
    for command in (["-c", check], [*tests, "-k", target]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(TRITON_36)},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
