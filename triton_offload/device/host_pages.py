"""Gather and scatter of pages in CPU memory.

numpy moves a page as one item of a void dtype of its size: a memmove an item, at any alignment,
without the GIL. torch's indexed copies of words reach less on most shapes, and where ids stand on
both sides a tenth of it: their pass through a temporary is cut up among threads per slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from triton_offload.kernels.table import IdArray, PageTable

# Bytes at a time: numpy passes what it gathers through a temporary, which then stays in the cache.
# Twice as much is as fast on a core with 512 KiB of its own, half is 0.8 of it.
_SLICE_BYTES = 256 << 10

# Less is not shared among threads: starting one takes 0.1 ms, in which a core copies this much.
_THREAD_BYTES = 1 << 20

_Items: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Pages of one tensor, and their places at the same positions of some chunks."""

    pages: _Items  # [num_blocks], an item a page
    blocks: IdArray  # [chunks, positions]
    places: _Items  # [num_slots, positions], an item a page
    slots: IdArray | slice  # [chunks]; a slice where they are adjacent, which is faster

    def gather(self) -> None:
        self.places[self.slots] = self.pages[self.blocks]

    def scatter(self) -> None:
        self.pages[self.blocks] = self.places[self.slots]


def gather(
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
) -> None:
    """Pages to slots: `kernels.reference.gather_pages` on checked int64 ids, tuned."""
    pieces = list(_pieces(table, block_ids, slots, slot_ids, first_block))
    _run(_Piece.gather, pieces, len(block_ids) * table.bytes_per_block)


def scatter(
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
) -> None:
    """Slots to pages: `kernels.reference.scatter_pages`, likewise."""
    pieces = list(_pieces(table, block_ids, slots, slot_ids, first_block))
    _run(_Piece.scatter, pieces, len(block_ids) * table.bytes_per_block)


def _run(move: Callable[[_Piece], None], pieces: list[_Piece], num_bytes: int) -> None:
    """Moves every piece, shared among as many threads as torch would take."""
    num_threads = max(1, min(torch.get_num_threads(), num_bytes // _THREAD_BYTES))
    shares = [pieces[i::num_threads] for i in range(num_threads)]

    def move_share(share: list[_Piece]) -> None:
        for piece in share:
            move(piece)

    if num_threads == 1:
        move_share(pieces)
        return
    with ThreadPoolExecutor(num_threads - 1) as others:
        results = [others.submit(move_share, share) for share in shares[1:]]
        move_share(shares[0])
    for result in results:
        result.result()


def _pieces(
    table: PageTable,
    block_ids: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    first_block: int,
) -> Iterator[_Piece]:
    """The run, tensor by tensor, in pieces of at most `_SLICE_BYTES`, or of one chunk."""
    memory = slots.numpy()
    grids = list(_grids(table.blocks_per_chunk, block_ids.numpy(), slot_ids.numpy(), first_block))
    for page in table.pages:
        item = np.dtype((np.void, page.page_bytes))
        pages = page.view.numpy().view(item)[:, 0]
        there = memory[:, page.offset : page.offset + table.blocks_per_chunk * page.pitch]
        if page.pitch == page.page_bytes:
            places = there.view(item)
        else:  # a group that moves a part of each page
            padded = np.dtype({"names": ["page"], "formats": [item], "itemsize": page.pitch})
            places = there.view(padded)["page"]
        for begin, blocks, chunks in grids:
            end = begin + blocks.shape[1]
            step = max(1, _SLICE_BYTES // (blocks.shape[1] * page.page_bytes))
            for start in range(0, len(chunks), step):
                some = slice(start, start + step)
                yield _Piece(pages, blocks[some], places[:, begin:end], _rows(chunks[some]))


def _grids(
    span: int, blocks: IdArray, chunks: IdArray, first_block: int
) -> Iterator[tuple[int, IdArray, IdArray]]:
    """(first position, blocks [chunks, positions], slots [chunks]): the first chunk's blocks where
    it isn't whole, those of all whole chunks, and the last one's."""
    begin = first_block % span
    first = min(-begin % span, len(blocks))
    if first:
        yield begin, blocks[None, :first], chunks[:1]
        blocks, chunks = blocks[first:], chunks[1:]
    whole, rest = divmod(len(blocks), span)
    if whole:
        yield 0, blocks[: whole * span].reshape(whole, span), chunks[:whole]
    if rest:
        yield 0, blocks[None, whole * span :], chunks[whole:]


def _rows(ids: IdArray) -> IdArray | slice:
    """Consecutive ids as a slice, others as they are."""
    first = int(ids[0])
    if int(ids[-1]) - first == len(ids) - 1 and bool((np.diff(ids) == 1).all()):
        return slice(first, first + len(ids))
    return ids
