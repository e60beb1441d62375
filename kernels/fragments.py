"""Pages that lie in a slot in parts, between those of others, each part with a place of its own.

So ranks that hold a part of every page each, some of the heads, fill one slot together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .table import PageTable


@dataclass(frozen=True)
class Fragment:
    """A part of every page of a tensor. All but ``tensor`` are bytes."""

    tensor: int
    """Which tensor of the table."""
    page_offset: int
    """Where in a page it begins."""
    num_bytes: int
    place: int
    """Where it lies in what a block of the tensor has of a slot."""


def fragment_table(
    table: PageTable,
    place_bytes: Sequence[int],
    fragments: Iterable[Fragment],
    *,
    name: str = "fragments",
) -> PageTable:
    """The table that has these parts of pages, each with a place of its own.

    With ``B = table.blocks_per_chunk``, a fragment of the block at position ``s`` lies in a slot
    at byte ``B * sum(place_bytes[:tensor]) + s * place_bytes[tensor] + place``. To the kernels it
    is a page like any other; what else is in the slot keeps its bytes.

    Args:
        table: The whole pages.
        place_bytes: What a block has of a slot, for each tensor of ``table``.
        fragments: At least one; no two have a byte of a slot in common.
        name: What errors call ``fragments``.

    Raises:
        ValueError: A fragment does not lie within its page or its place, or there is none.
    """
    if len(place_bytes) != len(table.pages):
        raise ValueError(
            f"place_bytes: expected one size for each of {len(table.pages)} tensors, "
            f"got {len(place_bytes)}"
        )
    span = table.blocks_per_chunk
    rows = []
    for each in fragments:
        row, room = table.pages[each.tensor], place_bytes[each.tensor]
        if (
            min(each.page_offset, each.place, each.num_bytes - 1) < 0
            or each.page_offset + each.num_bytes > row.page_bytes
            or each.place + each.num_bytes > room
        ):
            raise ValueError(
                f"{name}: expected parts of pages of {row.page_bytes} bytes in places of {room}, "
                f"got {each}"
            )
        rows.append(
            replace(
                row,
                view=row.view[:, each.page_offset : each.page_offset + each.num_bytes],
                page_bytes=each.num_bytes,
                pitch=room,
                offset=span * sum(place_bytes[: each.tensor]) + each.place,
                is_fragment=True,
            )
        )
    if not rows:
        raise ValueError(f"{name}: expected at least one part of a page, got none")
    return table.derived(tuple(rows), span * sum(place_bytes))
