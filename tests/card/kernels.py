"""Kernels as Triton compiles them, run on the imitated card's machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from card.machine import Counters, Function, Kind, Memory, Module
from triton.backends.compiler import GPUTarget

from triton_offload.kernels import compiling, pages
from triton_offload.kernels.block_run import check_run
from triton_offload.kernels.compiling import SUM_TYPES, compile_kernel
from triton_offload.kernels.table import PageTable
from triton_offload.kernels.tiling import KernelConfig, KernelSpec


@cache
def loaded(kernel: Any, spec: KernelSpec, target: GPUTarget) -> tuple[Function, int]:
    """A page kernel in the machine, and the shared memory that it is launched with."""
    return load(compile_kernel(kernel, spec, target))


def load(handle: Any) -> tuple[Function, int]:
    """The same of any kernel that Triton compiled."""
    return Module(handle.asm["ptx"]).function(handle.metadata.name), handle.metadata.shared


def launch(handle: tuple[Function, int], grid: int, arguments: tuple[int, ...]) -> Counters:
    """As Triton's launcher does: two pointers of its own come last."""
    function, shared_bytes = handle
    own = len(function.parameter_bytes) - len(arguments)
    return function.launch(grid, [*arguments, *[0] * own], shared_bytes=shared_bytes)


@contextlib.contextmanager
def launches_on_machine(target: GPUTarget) -> Iterator[list[Counters]]:
    """In the block, `launch_gather` and `launch_scatter` run on the machine. What each launch came
    to is put into the list. A launch's table of strips and its ids can be reached, and nothing
    else that the caller has not added; ids lie in pinned memory, as those of a transfer do."""
    counted: list[Counters] = []

    def run(
        kernel: Any, spec: KernelSpec, _: torch.device, programs: int, arguments: tuple[int, ...]
    ) -> None:
        named = dict(zip(SUM_TYPES, arguments, strict=False))
        end = named["first_block"] + named["num_blocks"]
        chunks = -(-end // named["blocks_per_chunk"])
        with Memory() as memory:
            # Rows lie behind the strips; who adds nothing up has no business there.
            row_bytes = 48 if "sums" in named else 40
            memory.add(named["strips"], row_bytes * named["num_strips"])
            if "sums" in named:
                memory.add(named["sums"], 8 * named["num_blocks"])
            memory.add(named["block_ids"], 8 * named["num_blocks"], Kind.PINNED)
            memory.add(named["slot_ids"], 8 * chunks, Kind.PINNED)
            counted.append(launch(loaded(kernel, spec, target), programs, arguments))

    with patch.object(compiling, "launch", run):
        yield counted


def move_pages(
    target: GPUTarget,
    direction: str,
    table: PageTable,
    block_ids: list[int],
    slots: torch.Tensor,
    slot_ids: list[int] | None = None,
    first_block: int = 0,
    *,
    config: KernelConfig,
    slots_in: Kind = Kind.DEVICE,
    sums: torch.Tensor | None = None,
) -> list[Counters]:
    """`gather_pages` or `scatter_pages` on the machine.

    The kernels can reach the tensors from their first page to their last one, and the slots; of
    these they can read the pages that they are to move, and no other byte.
    """
    checked: Any = direction
    run = check_run(table, block_ids, slots.shape[0], slot_ids, first_block, direction=checked)
    with Memory() as memory:
        _add_pages(memory, table, run.block_ids.tolist() if direction == "gather" else [])
        rows, row_bytes = slots.shape[0], table.slot_bytes
        begin, stride = slots.data_ptr(), slots.stride(0)
        memory.add(begin, (rows - 1) * stride + row_bytes, slots_in, written=False)
        for i, _ in enumerate(run.block_ids.tolist() if direction == "scatter" else []):
            chunk, place = divmod(run.first_block + i, table.blocks_per_chunk)
            slot = begin + int(run.slot_ids[chunk]) * stride
            for page in table.pages:
                at = slot + page.offset + place * page.pitch
                memory.mark_written(at, page.page_bytes)
        start = getattr(pages, f"launch_{direction}")
        with launches_on_machine(target) as counted:
            start(table, run.block_ids, slots, run.slot_ids, run.first_block, config, sums)
    return counted


def _add_pages(memory: Memory, table: PageTable, readable: list[int]) -> None:
    """A range for each storage, since views of one may lie between each other's pages."""
    bounds: dict[int, tuple[int, int]] = {}
    for page in table.pages:
        begin = page.view.data_ptr()
        end = begin + (page.view.shape[0] - 1) * page.block_stride + page.page_bytes
        storage = page.view.untyped_storage().data_ptr()
        low, high = bounds.get(storage, (begin, end))
        bounds[storage] = min(low, begin), max(high, end)
    for low, high in bounds.values():
        memory.add(low, high - low, written=False)
    for page in table.pages:
        for block in readable:
            at = page.view.data_ptr() + block * page.block_stride
            memory.mark_written(at, page.page_bytes)
