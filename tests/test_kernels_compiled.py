"""The code of the kernels, compiled ahead of time by the function that run time uses.

No device is needed. What is looked at: how wide accesses are, how many bytes a CTA has in flight,
and that a CTA fits the target: registers, no stack (spills show there), threads.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from triton_offload.kernels import compiling, pages
from triton_offload.kernels.compiling import compile_kernel
from triton_offload.kernels.table import PageTable
from triton_offload.kernels.tiling import KernelSpec, choose_config, kernel_specs

ROOT = Path(__file__).resolve().parent.parent
TRITON_36 = Path(os.environ.get("TRITON_36_PATH", ROOT / ".venv" / "triton-3.6"))
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {"gather": pages._gather_kernel, "scatter": pages._scatter_kernel}
KERNEL_CONSTANTS = ("WORD_BYTES", "PAGES", "WORDS", "EXACT", "PAGE_AXIS")
MAX_THREADS = 1024
KIB = 1024
# Page bytes, alignment of the slots, bytes of an access, bytes in flight on NVIDIA.
ZERO_COPY = {
    "pages of 512 bytes": (512, 16, 16, 128 * KIB),
    "pages of 4 KiB": (4096, 16, 16, 128 * KIB),
    "pages of 64 KiB": (65536, 16, 16, 128 * KIB),
    "pages of 2 MiB": (2 << 20, 16, 16, 128 * KIB),
    "pages of 1152 bytes": (1152, 16, 16, 64 * KIB),
    "pages of 4112 bytes": (4112, 16, 16, 64 * KIB),
    "words of 8 bytes": (4096, 8, 8, 128 * KIB),
    "words of 4 bytes": (4096, 4, 4, 64 * KIB),
    "words of 2 bytes": (4096, 2, 2, 32 * KIB),
    "pages of 577 bytes": (577, 16, 1, 8 * KIB),
}
STAGED = {
    "pages of 512 bytes": (512, 16, 16, 32 * KIB),
    "pages of 64 KiB": (65536, 16, 16, 32 * KIB),
    "pages of 1152 bytes": (1152, 16, 16, 16 * KIB),
    "words of 4 bytes": (4096, 4, 4, 16 * KIB),
}
CLASSES = {f"zero copy, {name}": (True, *values) for name, values in ZERO_COPY.items()} | {
    f"staged, {name}": (False, *values) for name, values in STAGED.items()
}


def spec_of(page_bytes: int, alignment: int, zero_copy: bool, backend: str) -> KernelSpec:
    """What a transfer of pages of this size launches, of a table as a user would make it."""
    table = PageTable([torch.empty(2, page_bytes, dtype=torch.uint8)], blocks_per_chunk=2)
    (spec,) = kernel_specs(table, alignment, choose_config(zero_copy=zero_copy, backend=backend))
    return spec


def cuobjdump(handle: Any, path: Path, option: str) -> str:
    path.write_bytes(handle.asm["cubin"])
    done = subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("direction", KERNELS)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("target", [name for name in TARGETS if name.startswith("sm_")])
def test_on_nvidia(target: str, name: str, direction: str, tmp_path: Path) -> None:
    zero_copy, page_bytes, alignment, width, in_flight = CLASSES[name]
    spec = spec_of(page_bytes, alignment, zero_copy, "cuda")
    handle = compile_kernel(KERNELS[direction], spec, TARGETS[target])
    threads = spec.warps * 32
    assert threads == handle.metadata.num_warps * 32 <= MAX_THREADS
    assert 4 <= spec.warps <= 8 or zero_copy

    ptx = handle.asm["ptx"]
    access = r"(?:\.v(\d))?\.b(\d+)"  # .v2.b64: two words of 64 bits
    loads = [int(v or 1) * int(b) // 8 for v, b in re.findall(rf"ld\.global\.cg{access}", ptx)]
    stores = [int(v or 1) * int(b) // 8 for v, b in re.findall(rf"st\.global{access}", ptx)]
    assert set(loads) == set(stores) == {width}
    assert sum(loads) * threads == sum(stores) * threads == in_flight == spec.tile_bytes
    # In flight together: no load waits for a store.
    assert ptx.rindex("ld.global.cg") < ptx.index("st.global")

    usage = cuobjdump(handle, tmp_path / "kernel.cubin", "-res-usage")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    assert int(stack) == 0
    assert int(registers) * threads <= 65536

    if width == 16:
        sass = cuobjdump(handle, tmp_path / "kernel.cubin", "-sass")
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
    suffix = {16: "dwordx4", 8: "dwordx2", 4: "dword", 2: "short", 1: "byte"}[width]
    stores = Counter(re.findall(r"global_store_(\w+)", assembly))
    assert set(stores) == {suffix}
    loads = Counter(re.findall(r"global_load_(?:u)?(\w+)", assembly))
    assert loads[suffix] >= stores[suffix] > 0
    # The compiler may unroll the loop over strips: at least a tile.
    assert stores[suffix] * width * threads >= spec.tile_bytes

    for spilled in ("vgpr_spill_count", "private_segment_fixed_size"):
        assert re.findall(rf"\.{spilled}:\s*(\d+)", assembly) == ["0"]
    # A SIMD has 512 registers for its share of the CTA's waves, four SIMDs to a CU.
    (registers,) = re.findall(r"\.vgpr_count:\s*(\d+)", assembly)
    assert int(registers) * max(1, spec.warps // 4) <= 512


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
def test_all_of_this_with_triton_36() -> None:
    check = "import triton; assert triton.__version__.startswith('3.6.'), triton.__version__"
    environment = {**os.environ, "PYTHONPATH": str(TRITON_36)}
    for command in (
        ["-c", check],
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), __file__],
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
