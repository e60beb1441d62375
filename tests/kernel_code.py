"""What compiled kernels are made of, without a device: accesses, registers, stack.

Shared by the tests of the kernels' code and by the benchmark's tables.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from triton_offload.kernels import movers
from triton_offload.kernels.table import PageTable
from triton_offload.kernels.tiling import (
    KernelSpec,
    choose_config,
    kernel_specs,
    summing_config,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {"gather": movers.gather_kernel, "scatter": movers.scatter_kernel}
KIB = 1024
# Page bytes, alignment of the slots, bytes of an access, bytes in flight on NVIDIA.
ZERO_COPY = {
    "pages of 128 bytes": (128, 16, 16, 64 * KIB),
    "pages of 256 bytes": (256, 16, 16, 64 * KIB),
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

_AMD_WIDTHS = {"dwordx4": 16, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "byte": 1}
_AMD_WIDTHS["ubyte"] = 1


def spec_of(
    page_bytes: int, alignment: int, zero_copy: bool, backend: str, *, sums: bool = False
) -> KernelSpec:
    """What a transfer of pages of this size launches, of a table as a user would make it."""
    table = PageTable([torch.empty(2, page_bytes, dtype=torch.uint8)], blocks_per_chunk=2)
    config = choose_config(zero_copy=zero_copy, backend=backend)
    (spec,) = kernel_specs(table, alignment, summing_config(config) if sums else config)
    return replace(spec, sums=sums)


def cuobjdump(handle: Any, option: str) -> str:
    """What the disassembler in triton's wheel says of a kernel for NVIDIA."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(handle.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True
        )
    return done.stdout


def nvidia_accesses(ptx: str, load: str = "ld.global") -> tuple[list[int], list[int]]:
    """Bytes of each load (of the kind `load`) and of each store of a thread, in order."""
    access = r"(?:\.v(\d))?\.b(\d+)"  # .v2.b64: two words of 64 bits
    loads = re.findall(rf"{re.escape(load)}{access}", ptx)
    stores = re.findall(rf"st\.global{access}", ptx)
    return (
        [int(v or 1) * int(b) // 8 for v, b in loads],
        [int(v or 1) * int(b) // 8 for v, b in stores],
    )


def nvidia_orders(ptx: str) -> set[str]:
    """The order in which a thread reaches memory, one string for each way through a kernel that
    takes no branch twice: `b` loads bytes of pages, `t` loads from tables, `s` stores."""
    events: dict[str, str] = {"": ""}
    ways: dict[str, list[str]] = {"": []}
    here, falls_through = "", True
    for line in ptx[ptx.index(".entry") :].splitlines():
        if label := re.match(r"(\$L__BB\w+):", line):
            if falls_through:
                ways[here].append(label[1])
            here, falls_through = label[1], True
            events[here], ways[here] = "", []
        elif branch := re.search(r"\bbra(\.uni)?\s+(\$\w+);", line):
            ways[here].append(branch[2])
            if branch[1] or "@" not in line:
                falls_through = False
        elif "ld.global.cg" in line:
            events[here] += "b"
        elif "ld.global" in line:
            events[here] += "t"
        elif "st.global" in line:
            events[here] += "s"

    def orders_from(block: str, taken: frozenset[tuple[str, str]]) -> set[str]:
        onward = [(block, to) for to in ways[block] if (block, to) not in taken]
        if not onward:
            return {events[block]}
        return {
            events[block] + rest for way in onward for rest in orders_from(way[1], taken | {way})
        }

    return orders_from("", frozenset())


def nvidia_registers_and_stack(handle: Any) -> tuple[int, int]:
    """Registers of a thread, and its bytes of stack: spills show there."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", cuobjdump(handle, "-res-usage"))
    assert usage is not None
    return int(usage[1]), int(usage[2])


def nvidia_loop_instructions(handle: Any) -> int:
    """Machine instructions of a kernel's longest loop, the one over tiles: what it does for further
    pages only, which it jumps over, included."""
    code = [
        (int(address, 16), text)
        for address, text in re.findall(
            r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", cuobjdump(handle, "-sass"), re.MULTILINE
        )
    ]
    loops = [
        sum(int(target[1], 16) <= other <= address for other, _ in code)
        for address, text in code
        if (target := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text))
    ]
    return max(loops, default=0)


def amd_accesses(assembly: str) -> tuple[list[int], list[int]]:
    """Bytes of each load and of each store of a thread, in order."""
    loads = re.findall(r"global_load_(\w+)", assembly)
    stores = re.findall(r"global_store_(\w+)", assembly)
    return [_AMD_WIDTHS[name] for name in loads], [_AMD_WIDTHS[name] for name in stores]


def amd_registers_stack_and_spills(assembly: str) -> tuple[int, int, int]:
    """Vector registers of a lane, bytes of stack, and registers spilled."""
    names = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    values = [re.findall(rf"\.{name}:\s*(\d+)", assembly) for name in names]
    registers, stack, spilled = (int(value) for (value,) in values)
    return registers, stack, spilled
