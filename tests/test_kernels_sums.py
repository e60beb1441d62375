"""The kernels add up what they move, as the reference says: compiled for each target, on the
imitated card's machine, and in Triton's interpreter.

The cases are those of the bytes: pages of every width, tiles of several pages, strips of a page.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from card.build import NO_COMPILER, compiler
from card.kernels import move_pages
from card.machine import Kind
from kernel_code import (
    CLASSES,
    KERNELS,
    TARGETS,
    nvidia_accesses,
    nvidia_registers_and_stack,
    spec_of,
)
from page_cases import CASES, SMALL, Case, Tensor, check

from triton_offload.kernels import pages
from triton_offload.kernels.block_run import check_run
from triton_offload.kernels.compiling import compile_kernel
from triton_offload.kernels.sums import sum_pages
from triton_offload.kernels.table import PageTable
from triton_offload.kernels.tiling import KernelConfig, choose_config, summing_config

ROOT = Path(__file__).resolve().parent.parent
TRITON_36 = Path(os.environ.get("TRITON_36_PATH", ROOT / ".venv" / "triton-3.6"))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NVIDIA = [name for name in TARGETS if name.startswith("sm_")]
# Code for the others is made of the same: they are executed where there is time.
MOST_USED = [pytest.param(name, marks=[pytest.mark.deep] * (name != "sm_90")) for name in NVIDIA]
BEFORE = 7  # what the sums held: they are added to

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason=NO_COMPILER),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


def expected_sums(table: PageTable, direction: str, run: Any, slots: torch.Tensor) -> list[int]:
    """Of the pages, after the move: both sides hold the same then."""
    blocks = run.block_ids.tolist()
    total = np.full(len(blocks), BEFORE)
    for page in table.pages:
        total += sum_pages(page.view[blocks].numpy(), page.first_row)
    return total.tolist()


def summing(target: str | None, slots_in: Kind = Kind.DEVICE) -> Any:
    """A mover for `check` that looks at the sums as well."""

    def move(
        direction: str,
        table: PageTable,
        block_ids: list[int],
        slots: torch.Tensor,
        slot_ids: list[int] | None = None,
        first_block: int = 0,
        *,
        config: KernelConfig,
    ) -> None:
        sums = torch.full((len(block_ids),), BEFORE)
        way: Any = direction
        run = check_run(table, block_ids, slots.shape[0], slot_ids, first_block, direction=way)
        if target is None:
            launch = getattr(pages, f"launch_{direction}")
            launch(table, run.block_ids, slots, run.slot_ids, run.first_block, config, sums)
        else:
            ids = block_ids, slots, slot_ids, first_block
            where = {"config": config, "slots_in": slots_in, "sums": sums}
            move_pages(TARGETS[target], direction, table, *ids, **where)
        assert sums.tolist() == expected_sums(table, direction, run, slots)

    return move


# Pages of several rows, cut into strips that are parts of a row, rows, and several of them.
ROWS = Case((Tensor(2064), Tensor(1040), Tensor(1160, 8), Tensor(1033, 3)), (3, 1, 0), 2, 1)


@pytest.mark.parametrize("direction", KERNELS)
@pytest.mark.parametrize("target", [None] if INTERPRETED else MOST_USED)
def test_every_page_of_a_block_is_added_up(target: str | None, direction: str) -> None:
    names = ["partial first chunk", "a different alignment each"]
    if INTERPRETED:
        names += ["alignment 8", "alignment 4", "alignment 2", "alignment 1"]
    for case in (ROWS, *(CASES[name] for name in names)):
        check(case, direction, summing(target), SMALL)


# One of each kind: pages in tiles of several, of one that warps share, and narrow words.
SOME = (
    "pages of 4 KiB",
    "staged, pages of 64 KiB",
    "pages of 577 bytes",
    "words of 4 bytes",
    "pages of 1152 bytes",
)
EACH_CLASS = [
    pytest.param(name, marks=[pytest.mark.deep] * (not name.endswith(SOME))) for name in CLASSES
]


@pytest.mark.skipif(INTERPRETED, reason="of compiled kernels")
@pytest.mark.parametrize("direction", KERNELS)
@pytest.mark.parametrize("name", EACH_CLASS)
@pytest.mark.parametrize("target", MOST_USED)
def test_pages_of_every_class_are_added_up(target: str, name: str, direction: str) -> None:
    zero_copy, page_bytes, alignment, *_ = CLASSES[name]
    if page_bytes > 1 << 16:
        page_bytes = 3 << 16  # as its strips are, and fewer of them to execute
    gap = -2 * page_bytes % 16 + alignment % 16
    tensors = (Tensor(page_bytes), Tensor(page_bytes))
    case = Case(tensors, (4, 0, 3), 2, 1, (2, 0), num_blocks=5, num_slots=3, slot_gap=gap)
    config = summing_config(choose_config(zero_copy=zero_copy))
    check(case, direction, summing(target, Kind.PINNED if zero_copy else Kind.DEVICE), config)


@pytest.mark.skipif(INTERPRETED, reason="of compiled kernels")
@pytest.mark.parametrize("direction", KERNELS)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("target", MOST_USED)
def test_as_many_bytes_are_in_flight_and_no_thread_waits_for_another_within_a_page(
    target: str, name: str, direction: str
) -> None:
    """Registers suffice, and what is handed on crosses shared memory once per page at most. (Pages
    of 128 bytes are one access of each of their threads: theirs cross with each tile.)"""
    zero_copy, page_bytes, alignment, width, in_flight = CLASSES[name]
    spec = spec_of(page_bytes, alignment, zero_copy, "cuda", sums=True)
    handle = compile_kernel(KERNELS[direction], spec, TARGETS[target])
    registers, stack = nvidia_registers_and_stack(handle)
    assert registers * spec.warps * 32 <= 65536
    assert stack == 0
    ptx = handle.asm["ptx"]
    loads, stores = nvidia_accesses(ptx, "ld.global.cg")
    assert set(loads) == set(stores) == {width}
    assert sum(loads) * spec.warps * 32 == in_flight == spec.tile_bytes
    assert "shfl" not in ptx
    assert "red.global" in ptx
    blocks = re.split(r"^\$L__BB", ptx, flags=re.MULTILINE)
    for block in blocks:  # of code: those that hand on are not those that move
        if "bar.sync" in block and page_bytes > 128:
            assert "red.global" in block
            assert "ld.global.cg" not in block
            assert "st.global" not in block


def test_a_ring_beside_sums_is_refused() -> None:
    table = PageTable([torch.zeros(2, 64, dtype=torch.uint8)])
    ids, slots = torch.tensor([0]), torch.zeros(2, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="config: expected no ring beside sums"):
        pages.launch_gather(table, ids, slots, ids, 0, pages.ring_config(2), ids)


@pytest.mark.skipif(INTERPRETED, reason="it is this that runs it")
def test_the_interpreter_adds_up_the_same() -> None:
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", __file__]
    command += ["-k", "every_page or ring"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.deep
@pytest.mark.skipif(INTERPRETED or not TRITON_36.is_dir(), reason="it compiles with triton 3.6")
def test_what_another_triton_compiles_adds_up_the_same() -> None:
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", __file__]
    path = os.pathsep.join([str(TRITON_36), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [*command, "-k", "class or every_page"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
