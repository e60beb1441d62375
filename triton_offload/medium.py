"""A medium of one's own: the chunks that its function reads or writes, while they are pinned."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from triton_offload.kernels.table import PageTable
from triton_offload.scheduler.chunks import bit_runs
from triton_offload.specs import Ids, LoadStoreSpec

Bytes = npt.NDArray[np.uint8]


class Chunk:
    """One chunk of the pool, in the hands of a job of `export_chunks` or `import_chunks`.

    `key`: as it was given. `blocks`: a bitmask, bit s for block s of the chunk: those that the job
    moves; a chunk may be partial. The slot's format is ARCHITECTURE.md's, the same on every
    machine for the same cache tensors and `blocks_per_chunk`.

    No store, load or eviction changes these bytes while the job is under way, a reset included.
    When it has ended, `data` and `write` raise RuntimeError.

    `sums`: of an export beside `verify`, what blocks added up to when they were stored, by their
    position in the chunk: `triton_offload.kernels.sums.slot_sums` of `data` has the same, if the
    bytes do.
    """

    def __init__(
        self, key: bytes, blocks: int, slot: Bytes, table: PageTable, *, writing: bool
    ) -> None:
        self.key = key
        self.blocks = blocks
        self.written = False
        self.sums: Mapping[int, int] = {}
        self._slot: Bytes | None = slot
        self._table = table
        self._writing = writing

    @property
    def data(self) -> memoryview:
        """Of an export: `slot_bytes` bytes, read-only, zeros where no page of `blocks` lies.

        A whole chunk is a view of the pool, good until the job ends: copy what is to stay.
        `file.write`, `zlib.crc32`, `numpy.frombuffer` take it as it is.
        """
        slot = self._bytes(writing=False)
        ranges = _page_ranges(self._table, self.blocks)
        if ranges != [(0, len(slot))]:
            whole, slot = slot, np.zeros_like(slot)
            for begin, end in ranges:
                slot[begin:end] = whole[begin:end]
        return slot.data.toreadonly()

    def write(self, data: bytes | bytearray | memoryview | npt.NDArray[Any]) -> None:
        """Of an import: put the pages of `blocks` into the pool, from the `data` of an export.

        `data`: a contiguous buffer (bytes, a memoryview, an array) of `slot_bytes` bytes, which
        stays the caller's. Blocks that the pool holds already keep theirs. Raises ValueError or
        TypeError for anything else; the chunk is as unwritten as before then.
        """
        slot = self._bytes(writing=True)
        try:
            source = np.frombuffer(data, np.uint8)
        except (TypeError, ValueError, BufferError, AttributeError) as error:
            raise TypeError(
                f"data: expected a contiguous buffer of {len(slot)} bytes, got {reprlib.repr(data)}"
            ) from error
        if len(source) != len(slot):
            raise ValueError(f"data: expected {len(slot)} bytes, got {len(source)}")
        for begin, end in _page_ranges(self._table, self.blocks):
            slot[begin:end] = source[begin:end]
        self.written = True

    def _bytes(self, *, writing: bool) -> Bytes:
        if self._slot is None:
            raise RuntimeError(f"the job of chunk {self.key!r} has ended")
        if writing is not self._writing:
            ways = ("export_chunks: read its `data`", "import_chunks: `write` it")
            raise RuntimeError(f"chunk {self.key!r} is one of {ways[self._writing]}")
        return self._slot


@dataclass(frozen=True, eq=False)
class ChunkSpec(LoadStoreSpec):
    """The pool's end of a job of `export_chunks` or `import_chunks`: chunks of one group.

    What `register_worker` has on one side: `(ChunkSpec, YourSpec)` for exports, `(YourSpec,
    ChunkSpec)` for imports. `chunks` are in the order of the keys.
    """

    chunks: tuple[Chunk, ...]
    group: int

    @classmethod
    def of(
        cls,
        keys: Sequence[bytes],
        blocks: Sequence[int],
        slots: torch.Tensor,
        slot_ids: Ids,
        table: PageTable,
        group: int,
        *,
        writing: bool,
        sums: Sequence[Mapping[int, int]] | None = None,
    ) -> ChunkSpec:
        """`slots`: the pool's, uint8 `[num_slots, slot_bytes]`; `keys[i]` is in `slot_ids[i]`, and
        `sums[i]` are what is known of it."""
        rows = slots.numpy()
        places = zip(keys, blocks, slot_ids.tolist(), strict=True)
        chunks = tuple(
            Chunk(key, mask, rows[slot], table, writing=writing) for key, mask, slot in places
        )
        for chunk, known in zip(chunks, sums or (), strict=False):
            chunk.sums = {s: known[s] for s in known if chunk.blocks >> s & 1}
        return cls(chunks, group)

    def end(self) -> list[bytes]:
        """Nobody may touch the slots from here on; the keys that an import did not write."""
        for chunk in self.chunks:
            chunk._slot = None
        return [chunk.key for chunk in self.chunks if chunk._writing and not chunk.written]


def check_kind(src_cls: type[LoadStoreSpec], dst_cls: type[LoadStoreSpec]) -> None:
    """Raises ValueError where no export or import is of that kind."""
    if (src_cls is ChunkSpec) == (dst_cls is ChunkSpec):
        names = [getattr(cls, "__name__", reprlib.repr(cls)) for cls in (src_cls, dst_cls)]
        raise ValueError(
            f"src_cls, dst_cls: expected ChunkSpec and a class of your own, in the order of the "
            f"way, got {names[0]} and {names[1]}"
        )


def check_spec(name: str, spec: LoadStoreSpec) -> None:
    """Raises TypeError unless it says where chunks lie in a medium of one's own."""
    if not isinstance(spec, LoadStoreSpec) or isinstance(spec, ChunkSpec):
        raise TypeError(
            f"{name}: expected an instance of your subclass of LoadStoreSpec, "
            f"got {reprlib.repr(spec)}"
        )


def _page_ranges(table: PageTable, blocks: int) -> list[tuple[int, int]]:
    """The bytes [begin, end) of a slot that are pages of these blocks, adjacent ones as one."""
    ranges: list[tuple[int, int]] = []
    for row in sorted(table.pages, key=lambda row: row.offset):
        for begin, end in bit_runs(blocks):
            if row.pitch == row.page_bytes:
                found = [(row.offset + begin * row.pitch, row.offset + end * row.pitch)]
            else:
                starts = [row.offset + s * row.pitch for s in range(begin, end)]
                found = [(start, start + row.page_bytes) for start in starts]
            for start, stop in found:
                if ranges and start == ranges[-1][1]:
                    ranges[-1] = (ranges[-1][0], stop)
                else:
                    ranges.append((start, stop))
    return ranges
