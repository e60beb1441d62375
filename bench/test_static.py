"""The kernels' code, compiled ahead of time for every target: nothing here needs a device.

    python bench/run.py static

The time of a benchmark is that of compiling, with triton's cache as it was found. The peer's
kernel is compiled beside ours where vLLM is installed.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import triton
import triton.language as tl
from kernel_code import (
    CLASSES,
    KERNELS,
    TARGETS,
    amd_accesses,
    amd_registers_stack_and_spills,
    nvidia_accesses,
    nvidia_registers_and_stack,
    spec_of,
)
from peers import vllm_module
from timing import note
from triton.compiler import ASTSource

from triton_offload.kernels.compiling import compile_kernel

PEER_CHUNK_BYTES = 8192  # what vLLM launches with for pages of 8 KiB or more
PEER_WARPS = 4  # triton's default


@pytest.mark.parametrize("direction", KERNELS)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("target", TARGETS)
def test_our_kernels(benchmark: Any, target: str, name: str, direction: str) -> None:
    zero_copy, page_bytes, alignment, *_ = CLASSES[name]
    backend = TARGETS[target].backend
    spec = spec_of(page_bytes, alignment, zero_copy, backend)
    handle = benchmark.pedantic(compile_kernel, (KERNELS[direction], spec, TARGETS[target]))
    describe(benchmark, handle, target, "ld.global.cg", kernel=direction, name=name)
    if backend == "hip":  # the loop over strips may be unrolled: its stores are of several tiles
        benchmark.extra_info["in_flight_bytes"] = spec.tile_bytes


@pytest.mark.parametrize("target", [name for name in TARGETS if name.startswith("sm_")])
def test_the_kernel_of_vllm(benchmark: Any, target: str) -> None:
    handle = benchmark.pedantic(compile_peer, (target, PEER_CHUNK_BYTES))
    describe(benchmark, handle, target, "ld.global", kernel="vLLM's", name="any page")


def compile_peer(target: str, chunk_bytes: int) -> Any:
    """vLLM's kernel, for pages that it moves in so many bytes at once. Skips where vLLM is not."""
    types_of = {"src_addrs": "*i64", "dst_addrs": "*i64", "sizes": "*i64", "n_jobs": "i32"}
    source = ASTSource(
        fn=peer_kernel(),
        signature={**types_of, "BYTES_PER_CHUNK": "constexpr"},
        constexprs={"BYTES_PER_CHUNK": chunk_bytes},
    )
    options = {"num_warps": PEER_WARPS, "enable_fp_fusion": False}
    return triton.compile(source, target=TARGETS[target], options=options)


def peer_kernel() -> Any:
    """vLLM's kernel as triton's. Without a GPU vLLM puts a stand-in in triton's place, so that the
    function is taken with triton's language put back."""
    found = vllm_module("v1.kv_offload.cpu.swap_blocks_triton")._swap_blocks_kernel
    function = getattr(found, "fn", found)
    return triton.jit(types.FunctionType(function.__code__, {**function.__globals__, "tl": tl}))


def describe(benchmark: Any, handle: Any, target: str, load: str, **names: str) -> None:
    """Note accesses, bytes in flight, registers and stack of a compiled kernel."""
    lanes = TARGETS[target].warp_size
    threads = handle.metadata.num_warps * lanes
    if target.startswith("sm_"):
        loads, stores = nvidia_accesses(handle.asm["ptx"], load)
        assert max(loads) == max(stores)
        registers, stack = nvidia_registers_and_stack(handle)
    else:
        assembly = handle.asm["amdgcn"]
        _, stores = amd_accesses(assembly)
        registers, stack, _ = amd_registers_stack_and_spills(assembly)
    # Stores tell what is moved: loads read ids and tables besides.
    note(
        benchmark,
        "static",
        target=target,
        access_bytes=min(stores),
        in_flight_bytes=sum(stores) * threads,
        threads=threads,
        registers=registers,
        stack_bytes=stack,
        **names,
    )
    benchmark.extra_info["device"] = "compiled ahead of time"
