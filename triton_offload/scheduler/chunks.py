"""Which blocks of a request lie in which chunk."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, SupportsIndex

from triton_offload.kernels.arguments import as_integer


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """`num_blocks` consecutive blocks from position `first < blocks_per_chunk` of a chunk on."""

    first: int
    num_blocks: int
    blocks_per_chunk: int

    @classmethod
    def of(
        cls,
        first_block: SupportsIndex,
        num_blocks: SupportsIndex,
        blocks_per_chunk: SupportsIndex,
    ) -> ChunkSpan:
        """The span of blocks that begins at block `first_block` of a request."""
        size = as_integer("blocks_per_chunk", blocks_per_chunk, 1)
        first = as_integer("first_block", first_block) % size
        return cls(first, as_integer("num_blocks", num_blocks), size)

    @property
    def num_chunks(self) -> int:
        return -(-(self.first + self.num_blocks) // self.blocks_per_chunk) if self.num_blocks else 0

    @property
    def is_whole(self) -> bool:
        """Whether it has every block of its chunks."""
        return self.first == 0 and self.num_blocks % self.blocks_per_chunk == 0

    def masks(self) -> list[int]:
        """Of each chunk, the blocks in the span: bit s for the block at position s."""
        full = (1 << self.blocks_per_chunk) - 1
        masks = [full] * self.num_chunks
        if masks:
            masks[0] &= full << self.first
            end = self.first + self.num_blocks - (len(masks) - 1) * self.blocks_per_chunk
            masks[-1] &= (1 << end) - 1
        return masks


class StoreRun(NamedTuple):
    """A part of a store that is one run: every chunk but its first and last is whole.

    `blocks`: which of the request's block ids, in order. `first`: the first one's position in its
    chunk. `chunks`: which of the stored chunks, in order.
    """

    blocks: list[int] | slice
    first: int
    chunks: list[int] | slice


def runs_to_store(span: ChunkSpan, chunks: Sequence[int], masks: Sequence[int]) -> list[StoreRun]:
    """Cut a store of some chunks of a span into runs.

    `chunks[i]`: a chunk of the span; `masks[i]`: its blocks that are to be stored. The common
    store is one run; a chunk of which blocks in the middle are stored already makes two.
    """
    if len(chunks) == span.num_chunks and list(masks) == span.masks():
        return [StoreRun(slice(None), span.first, slice(None))] if chunks else []
    size = span.blocks_per_chunk
    runs: list[StoreRun] = []
    blocks: list[int] = []
    stored: list[int] = []
    open_end = False  # the last run ends at its chunk's end, so that the next chunk may join
    for i, (chunk, mask) in enumerate(zip(chunks, masks, strict=True)):
        for begin, end in bit_runs(mask):
            if not (open_end and begin == 0):
                blocks, stored = [], []
                runs.append(StoreRun(blocks, begin, stored))
            start = chunk * size - span.first
            blocks.extend(range(start + begin, start + end))
            stored.append(i)
            open_end = end == size
    return runs


def check_masks(masks: Sequence[int], count: int, every_block: int) -> list[int]:
    """So many masks, each of some of the blocks of `every_block`; raises ValueError."""
    if len(masks) != count:
        raise ValueError(f"blocks: expected {count} masks, got {len(masks)}")
    try:
        checked = list(map(operator.index, masks))  # numpy's integers overflow
    except TypeError:
        raise ValueError(f"blocks: expected integers as masks, got {list(masks)!r}") from None
    if checked and (min(checked) < 1 or max(checked) > every_block):
        wrong = next(mask for mask in checked if not 0 < mask <= every_block)
        raise ValueError(f"blocks: expected masks of 1 to {every_block}, got {wrong}")
    return checked


def positions(mask: int) -> str:
    """The blocks of a mask as people write them: "0-2, 5"."""
    runs = [(begin, end - 1) for begin, end in bit_runs(mask)]
    return ", ".join(f"{first}-{last}" if first < last else f"{first}" for first, last in runs)


def bit_runs(mask: int) -> list[tuple[int, int]]:
    """The runs [begin, end) of ones, from the lowest."""
    runs = []
    position = 0
    while mask:
        zeros = (mask & -mask).bit_length() - 1
        mask >>= zeros
        ones = (~mask & (mask + 1)).bit_length() - 1
        runs.append((position + zeros, position + zeros + ones))
        mask >>= ones
        position += zeros + ones
    return runs
