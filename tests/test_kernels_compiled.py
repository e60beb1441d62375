"""The code of the kernels, compiled ahead of time by the function that run time uses.

No device is needed. What is looked at: how wide accesses are, how many bytes a CTA has in flight,
and that a CTA fits the target: registers, no stack (spills show there), threads.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from kernel_code import (
    CLASSES,
    KERNELS,
    TARGETS,
    amd_accesses,
    amd_registers_stack_and_spills,
    cuobjdump,
    nvidia_accesses,
    nvidia_orders,
    nvidia_registers_and_stack,
    spec_of,
)

from triton_offload.kernels import compiling, pages
from triton_offload.kernels.compiling import compile_kernel
from triton_offload.kernels.table import PageTable
from triton_offload.kernels.tiling import choose_config

ROOT = Path(__file__).resolve().parent.parent
TRITON_36 = Path(os.environ.get("TRITON_36_PATH", ROOT / ".venv" / "triton-3.6"))

KERNEL_CONSTANTS = ("sums", "WORD_BYTES", "PAGES", "WORDS", "SPAN", "EXACT", "PAGE_AXIS", "FOLD")
MAX_THREADS = 1024
_PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT))


@pytest.mark.parametrize("direction", KERNELS)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("target", [name for name in TARGETS if name.startswith("sm_")])
def test_on_nvidia(target: str, name: str, direction: str) -> None:
    zero_copy, page_bytes, alignment, width, in_flight = CLASSES[name]
    spec = spec_of(page_bytes, alignment, zero_copy, "cuda")
    handle = compile_kernel(KERNELS[direction], spec, TARGETS[target])
    threads = spec.warps * 32
    assert threads == handle.metadata.num_warps * 32 <= MAX_THREADS
    assert 4 <= spec.warps <= 8 or zero_copy

    ptx = handle.asm["ptx"]
    loads, stores = nvidia_accesses(ptx, "ld.global.cg")
    assert set(loads) == set(stores) == {width}
    assert sum(loads) * threads == sum(stores) * threads == in_flight == spec.tile_bytes
    # The bytes of a tile are in flight together, and all that the next tile's bytes need is read
    # before they are stored. A way through a kernel ends where it would take a branch again.
    read = f"b{{{len(loads)}}}t+"
    tile = f"{read}s{{{len(stores)}}}"
    orders = nvidia_orders(ptx)
    assert all(re.fullmatch(f"t+({tile})*({read})?", order) for order in orders), orders
    assert any(re.fullmatch(f"t+{tile}{read}", order) for order in orders), orders
    # Nor does a warp wait for another: none needs what another read.
    assert "bar.sync" not in ptx

    registers, stack = nvidia_registers_and_stack(handle)
    assert stack == 0
    assert registers * threads <= 65536

    if width == 16:
        sass = cuobjdump(handle, "-sass")
        assert len(re.findall(r"\bLDG\.E\.(?:\w+\.)*128\b", sass)) >= len(loads)
        assert len(re.findall(r"\bSTG\.E\.(?:\w+\.)*128\b", sass)) >= len(stores)


@pytest.mark.parametrize("direction", KERNELS)
@pytest.mark.parametrize("name", CLASSES)
def test_on_amd(name: str, direction: str) -> None:
    zero_copy, page_bytes, alignment, width, _ = CLASSES[name]
    spec = spec_of(page_bytes, alignment, zero_copy, "hip")
    handle = compile_kernel(KERNELS[direction], spec, TARGETS["gfx942"])
    threads = spec.warps * 64
    assert threads == handle.metadata.num_warps * 64 <= MAX_THREADS

    assembly = handle.asm["amdgcn"]
    loads, stores = amd_accesses(assembly)
    assert set(stores) == {width}
    assert loads.count(width) >= len(stores) > 0
    # The compiler may unroll the loop over strips: at least a tile.
    assert sum(stores) * threads >= spec.tile_bytes

    registers, stack, spilled = amd_registers_stack_and_spills(assembly)
    assert stack == spilled == 0
    # A SIMD has 512 registers for its share of the CTA's waves, four SIMDs to a CU.
    assert registers * max(1, spec.warps // 4) <= 512


def test_one_kernel_serves_every_number_of_blocks() -> None:
    spec = spec_of(4096, 16, True, "cuda")
    first = compile_kernel(KERNELS["gather"], spec, TARGETS["sm_90"])
    assert compile_kernel(KERNELS["gather"], spec, TARGETS["sm_90"]) is first
    assert "tt.divisibility = 16" not in first.asm["ttir"].split("attributes")[0]


@pytest.mark.parametrize("direction", KERNELS)
def test_a_launch_passes_its_arguments_in_the_order_of_the_parameters(
    direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[dict[str, Any]] = []

    class Handle:
        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            def run(*arguments: Any, stream: int) -> None:
                names = KERNELS[direction].arg_names
                named = dict(zip(names, arguments, strict=True))
                launched.append({"grid": grid, "stream": stream, **named})

            return run

    monkeypatch.setattr(compiling, "load_kernel", lambda *_: Handle())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    table = PageTable([torch.empty(64, 4096, dtype=torch.uint8) for _ in range(5)], 2)
    slots = torch.empty(40, table.slot_bytes + 16, dtype=torch.uint8)
    blocks, chunks = torch.arange(33), torch.arange(17)
    launch = getattr(pages, f"launch_{direction}")
    launch(table, blocks, slots, chunks, 1, choose_config(zero_copy=False))

    (call,) = launched
    tiles = 5 * 5  # five tensors, and eight pages in a tile of 32 KiB
    assert call["grid"] == (13, 1, 1)
    assert call["tiles_per_program"] == 2 == -(-tiles // 13)
    assert call["stream"] == 77
    assert (call["num_strips"], call["num_blocks"], call["first_block"]) == (5, 33, 1)
    assert (call["block_ids"], call["slot_ids"]) == (blocks.data_ptr(), chunks.data_ptr())
    assert (call["slots"], call["stride_slot"]) == (slots.data_ptr(), table.slot_bytes + 16)
    assert (call["blocks_per_chunk"], call["PAGES"], call["WORD_BYTES"]) == (2, 8, 16)
    assert [*call][2:] == [*compiling.ARGUMENT_TYPES, *KERNEL_CONSTANTS]


@pytest.mark.skipif(not (TRITON_36 / "triton").is_dir(), reason=f"no triton in {TRITON_36}")
@pytest.mark.skipif(triton.__version__.startswith("3.6."), reason="this is triton 3.6")
@pytest.mark.parametrize(
    "chosen", ["not sm_80 and not sm_100", pytest.param("sm_80 or sm_100", marks=pytest.mark.deep)]
)
def test_all_of_this_with_triton_36(chosen: str) -> None:
    check = "import triton; assert triton.__version__.startswith('3.6.'), triton.__version__"
    environment = {**os.environ, "PYTHONPATH": str(TRITON_36)}
    for command in (
        ["-c", check],
        [*_PYTEST, "-k", chosen, __file__],
    ):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
