"""Moves pages between scattered cache blocks and the slots of chunks, by the kernels of `movers`.

One pair of kernels serves both ways of crossing to the host: slots in device memory (a staging
buffer) and slots in mapped host memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from . import compiling
from .arguments import IdArray
from .block_run import Direction, Ids, check_run, check_slots
from .movers import gather_kernel, scatter_kernel
from .table import PageTable, alignment_of
from .tiling import (
    KernelConfig,
    KernelSpec,
    choose_config,
    cut_into_strips,
    ring_config,
    summing_config,
)

__all__ = [
    "KernelConfig",
    "PageTable",
    "choose_config",
    "gather_pages",
    "launch_gather",
    "launch_scatter",
    "prepare",
    "ring_config",
    "scatter_pages",
    "summing_config",
]


def gather_pages(
    table: PageTable,
    block_ids: Ids,
    slots: torch.Tensor,
    slot_ids: Ids | None = None,
    first_block: int = 0,
    *,
    config: KernelConfig | None = None,
) -> None:
    """Copy the pages of a run of blocks into the slots of its chunks, on the device.

    ``block_ids[i]`` is block ``b = first_block + i`` of a run of chunks: with
    ``B = table.blocks_per_chunk`` its pages go to slot ``slot_ids[b // B]``, position ``b % B``.
    Every other byte of ``slots`` stays as it is. Queued on the current stream of ``table.device``;
    the caller keeps ``slots`` and the cache alive until it has run.

    Args:
        table: Where the pages lie.
        block_ids: ``[n]`` ids of blocks to read; may repeat. A list, a numpy array or an integer
            tensor: copied, and the caller's again on return. Ids in a tensor on the device are
            trusted, not checked, and read when the kernel runs: the caller leaves them as they
            are until then, or changes them by work on the same stream.
        slots: uint8 ``[num_slots, >= table.slot_bytes]``, rows at any stride; on the table's
            device, or pinned host memory that the device maps.
        slot_ids: ``[ceil((first_block + n) / B)]`` distinct slots, one for each chunk of the run;
            those of chunks before ``first_block`` are not looked at. None for 0, 1, ... Copied, or
            left alone on the device, as ``block_ids`` are.
        first_block: Where in its run of chunks the first block lies.
        config: None for ``choose_config``; ``ring_config`` gives another.

    Raises:
        ValueError: An id out of range, a slot named twice, a wrong number of slot ids, slots of
            another shape or on a device that can't be reached, or a table in host memory (unless
            Triton interprets).
    """
    _transfer(table, block_ids, slots, slot_ids, first_block, config, "gather")


def scatter_pages(
    table: PageTable,
    block_ids: Ids,
    slots: torch.Tensor,
    slot_ids: Ids | None = None,
    first_block: int = 0,
    *,
    config: KernelConfig | None = None,
) -> None:
    """Copy the pages of a run of blocks out of the slots of its chunks; see ``gather_pages``.

    Block ids must be distinct, slot ids may repeat. Every other byte of the cache stays as it is.
    """
    _transfer(table, block_ids, slots, slot_ids, first_block, config, "scatter")


def launch_gather(
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
    config: KernelConfig,
    sums: torch.Tensor | None = None,
) -> None:
    """Queue ``gather_pages`` for ids that were checked before; nothing is checked here.

    Args:
        block_ids, slot_ids: Contiguous int64 tensors on the device or in mapped pinned host
            memory. The caller leaves them as they are until the launch has run.
        first_block: Position of the first block in its chunk, in ``[0, B)``.
        sums: int64 ``[n]`` on the device, or None. What the pages of block i add up to, as they
            pass, is added to ``sums[i]`` (see ``sums``).

    Raises:
        ValueError: ``sums`` beside a ring, which does not add up.
    """
    _launch("gather", table, block_ids, slots, slot_ids, first_block, config, sums)


def launch_scatter(
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
    config: KernelConfig,
    sums: torch.Tensor | None = None,
) -> None:
    """Queue ``scatter_pages`` for ids that were checked before; see ``launch_gather``."""
    _launch("scatter", table, block_ids, slots, slot_ids, first_block, config, sums)


def prepare(
    table: PageTable,
    slots_alignment: int = 16,
    config: KernelConfig | None = None,
    *,
    sums: bool = False,
) -> None:
    """Do ahead of the first transfer what blocks the host: compile both kernels, load them, and
    put the addresses of ``table`` on its device.

    Args:
        slots_alignment: Largest of 16, 8, 4, 2, 1 that divides the address of the slots and the
            bytes between them. Slots of another alignment are prepared on their first launch.
        config: What the launches will use; None for both of ``choose_config``.
        sums: Prepare the kernels that add up.
    """
    _check_table(table)
    if slots_alignment not in (16, 8, 4, 2, 1):
        raise ValueError(f"slots_alignment: expected 16, 8, 4, 2 or 1, got {slots_alignment!r}")
    backend = compiling.backend_of(gather_kernel, table.device)
    both = [choose_config(zero_copy=zero_copy, backend=backend) for zero_copy in (False, True)]
    for each in both if config is None else [config]:
        for plain, _ in _plan(table, slots_alignment, each):
            spec = replace(plain, sums=sums)
            for kernel in (kernel_of("gather", spec), kernel_of("scatter", spec)):
                if not compiling.is_interpreted(kernel):
                    compiling.load_kernel(kernel, spec, table.device)


def kernel_of(direction: Direction, spec: KernelSpec) -> Any:
    """The kernel that moves tiles of ``spec``."""
    if spec.stages > 1:
        # Gluon is loaded where it is asked for: not every Triton has it.
        from .ring import KERNELS

        return KERNELS[direction]
    return gather_kernel if direction == "gather" else scatter_kernel


def _transfer(
    table: PageTable,
    block_ids: Ids,
    slots: torch.Tensor,
    slot_ids: Ids | None,
    first_block: int,
    config: KernelConfig | None,
    direction: Direction,
) -> None:
    _check_table(table)
    check_slots(table, slots)
    zero_copy = slots.device != table.device
    if zero_copy and not (slots.device.type == "cpu" and slots.is_pinned()):
        raise ValueError(
            f"slots: expected a tensor on {table.device} or in pinned host memory, got one on "
            f"{slots.device}{'' if slots.device.type != 'cpu' else ' that is not pinned'}"
        )
    run = check_run(table, block_ids, slots.shape[0], slot_ids, first_block, direction=direction)
    if config is None:
        config = choose_config(
            zero_copy=zero_copy, backend=compiling.backend_of(gather_kernel, table.device)
        )
    blocks = run.block_ids.to(table.device)
    chunk_slots = run.slot_ids.to(table.device)
    _launch(direction, table, blocks, slots, chunk_slots, run.first_block, config)


def _launch(
    direction: Direction,
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
    config: KernelConfig,
    sums: torch.Tensor | None = None,
) -> None:
    if sums is not None and config.stages > 1:
        raise ValueError(f"config: expected no ring beside sums, got {config}")
    num_blocks, first_block = block_ids.shape[0], int(first_block)
    if num_blocks == 0:
        return
    address = slots.data_ptr()
    # The stride of a single row takes part in no address.
    stride_slot = slots.stride(0) if slots.shape[0] > 1 else 0
    for spec, strips in _plan(table, alignment_of(address, stride_slot), config):
        num_strips = strips.shape[0]
        num_tiles = num_strips * -(-num_blocks // spec.pages)
        # The kernels count both in 32 bits, up to the last program's end, and the tiles that are
        # read ahead.
        end = first_block + num_blocks + (1 + spec.stages) * spec.pages
        if max(num_tiles + config.programs, end) >= 2**31:
            raise ValueError(
                f"block_ids: expected fewer than 2**31 blocks and tiles a launch, got "
                f"{num_blocks} blocks in {num_tiles} tiles"
            )
        tiles_per_program = -(-num_tiles // min(config.programs, num_tiles))
        arguments: tuple[int, ...] = (
            strips.data_ptr(),
            num_strips,
            block_ids.data_ptr(),
            num_blocks,
            address,
            stride_slot,
            slot_ids.data_ptr(),
            first_block,
            table.blocks_per_chunk,
            tiles_per_program,
        )
        if sums is not None:
            arguments += (sums.data_ptr(),)
            spec = replace(spec, sums=True)
        programs = -(-num_tiles // tiles_per_program)
        compiling.launch(kernel_of(direction, spec), spec, table.device, programs, arguments)


def _plan(
    table: PageTable, slots_alignment: int, config: KernelConfig
) -> list[tuple[KernelSpec, torch.Tensor]]:
    """Kernels of a transfer and their strips on the device; made once, kept with the table."""
    key = slots_alignment, config.warps, config.tile_bytes, config.stages
    plan = table.launch_plans.get(key)
    if plan is None:
        with torch.inference_mode(False):  # other threads will use it, outside of it
            plan = [
                (spec, _on_device(strips, rows, table.device))
                for spec, strips, rows in cut_into_strips(table, slots_alignment, config)
            ]
        table.launch_plans[key] = plan
    return plan


def _on_device(strips: IdArray, rows: IdArray, device: torch.device) -> torch.Tensor:
    """int64 ``[num_strips, 5]``, with the rows behind it in the same memory."""
    both = torch.from_numpy(np.concatenate([strips.ravel(), rows])).to(device)
    return both[: strips.size].view(strips.shape)


def _check_table(table: PageTable) -> None:
    if table.device.type != "cuda" and not compiling.is_interpreted(gather_kernel):
        raise ValueError(
            f"table: expected tensors on a GPU, got tensors on {table.device}; pages in host "
            f"memory are moved by triton_offload.kernels.reference"
        )
