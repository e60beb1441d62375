"""The ring of tiles in shared memory: its code, for every target, and what it moves, executed.

Triton's interpreter does not run Gluon, so the compiled kernels are run on the imitated card, as
those of `test_card_kernels.py` are.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from card.build import NO_COMPILER, compiler
from card.kernels import move_pages
from card.machine import Counters, Kind
from kernel_code import KIB, TARGETS, nvidia_accesses, nvidia_registers_and_stack
from page_cases import CASES, Case, Tensor, check

from triton_offload.kernels import pages
from triton_offload.kernels.block_run import Direction
from triton_offload.kernels.compiling import compile_kernel
from triton_offload.kernels.table import PageTable
from triton_offload.kernels.tiling import (
    KernelConfig,
    KernelSpec,
    choose_config,
    kernel_specs,
    ring_config,
)

ROOT = Path(__file__).resolve().parent.parent
TRITON_36 = Path(os.environ.get("TRITON_36_PATH", ROOT / ".venv" / "triton-3.6"))
NVIDIA = [name for name in TARGETS if name.startswith("sm_")]
DIRECTIONS: tuple[Direction, ...] = ("gather", "scatter")
# A stage of one KiB and a few of them: the cases go around the ring.
SMALL_RING = KernelConfig(warps=2, tile_bytes=1024, programs=3, stages=4)
executed = pytest.mark.skipif(compiler() is None, reason=NO_COMPILER)


def spec_of(page_bytes: int, config: KernelConfig) -> KernelSpec:
    table = PageTable([torch.empty(2, page_bytes, dtype=torch.uint8)])
    (spec,) = kernel_specs(table, 16, config)
    return spec


def move(target: str, **options: Any) -> Any:
    def on_machine(*arguments: Any, **more: Any) -> list[Counters]:
        return move_pages(TARGETS[target], *arguments, **options, **more)

    return on_machine


@pytest.mark.parametrize("stages", [8, 16])
@pytest.mark.parametrize("page_bytes", [128, 512, 1152, 4096, 65536])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("target", NVIDIA)
def test_many_bytes_are_in_flight_with_few_registers(
    target: str, direction: Direction, page_bytes: int, stages: int
) -> None:
    spec = spec_of(page_bytes, KernelConfig(warps=4, tile_bytes=8 * KIB, programs=2, stages=stages))
    handle = compile_kernel(pages.kernel_of(direction, spec), spec, TARGETS[target])
    ptx, threads = handle.asm["ptx"], spec.warps * 32
    copies = re.findall(r"cp\.async\.(\w+)\.shared\.global.*?, (0x\w+|\d+)", ptx)
    assert set(copies) <= {("cg", "16"), ("cg", "0x10")}, set(copies)
    _, stores = nvidia_accesses(ptx)
    assert set(stores) == {16}
    assert len(copies) * 16 * threads == sum(stores) * threads == spec.tile_bytes
    assert spec.tile_bytes == (8 if spec.exact else 4) * KIB
    assert handle.metadata.shared == stages * spec.tile_bytes
    # All threads are done with a stage before it is filled again, and see what others copied.
    assert ptx.count("bar.sync") <= 2
    registers, stack = nvidia_registers_and_stack(handle)
    assert stack == 0
    assert registers <= 72


def test_every_card_has_room_for_the_ring_of_a_calibration() -> None:
    ring = ring_config(4)
    assert ring.tile_bytes * ring.stages == 64 * KIB < 99 * KIB  # sm_86, sm_89, sm_120
    assert (ring.programs, ring.warps) == (4, 4)


def test_narrow_words_have_the_plain_kernels() -> None:
    table = PageTable([torch.empty(4, size, dtype=torch.uint8) for size in (4096, 24, 6)])
    wide, *narrow = kernel_specs(table, 16, ring_config(2))
    assert (wide.word_bytes, wide.stages) == (16, 8)
    assert [(spec.word_bytes, spec.stages) for spec in narrow] == [(8, 1), (2, 1)]
    plain = KernelConfig(4, 16 * KIB, 2)
    assert narrow == kernel_specs(table, 16, plain)[1:]
    for direction in DIRECTIONS:
        kernels = {pages.kernel_of(direction, spec) for spec in (wide, *narrow)}
        assert len(kernels) == 2
        (own,) = kernel_specs(PageTable([torch.empty(4, 64)]), 16, choose_config(zero_copy=True))
        assert pages.kernel_of(direction, own) in kernels


@executed
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("target", NVIDIA)
def test_moves_these_bytes_and_no_other(target: str, direction: str) -> None:
    for case in CASES.values():
        check(case, direction, move(target), SMALL_RING)


@executed
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("target", NVIDIA)
def test_goes_around_the_ring_many_times(target: str, direction: str) -> None:
    sizes = (4096, 512, 1152, 128)
    blocks = tuple(i * 7 % 40 for i in range(37))
    case = Case(tuple(map(Tensor, sizes)), blocks, 2, 1, num_blocks=40, num_slots=20)
    counted: list[Counters] = []

    def launch(*arguments: Any, **options: Any) -> None:
        counted.extend(move(target, slots_in=Kind.PINNED)(*arguments, **options))

    ring = KernelConfig(warps=4, tile_bytes=2 * KIB, programs=3, stages=8)
    check(case, direction, launch, ring)
    (once,) = counted
    assert once.bytes_written == len(blocks) * sum(sizes)
    # Nothing is copied that is not stored: no page of another group, no tile of another program.
    assert once.accesses_by_width[16] == 2 * once.bytes_written // 16
    # Masked tiles: half of the bytes that exact ones have.
    assert ring.stages * ring.tile_bytes // 4 < once.most_bytes_in_flight


@pytest.mark.skipif(not (TRITON_36 / "triton").is_dir(), reason=f"no triton in {TRITON_36}")
@pytest.mark.skipif(triton.__version__.startswith("3.6."), reason="this is triton 3.6")
@pytest.mark.parametrize("target", NVIDIA)
def test_all_of_this_with_triton_36(target: str) -> None:
    check = "import triton; assert triton.__version__.startswith('3.6.'), triton.__version__"
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), __file__]
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
