"""What moves: the cache tensors, their groups, and a job's ids checked against them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from triton_offload.kernels.arguments import shown
from triton_offload.kernels.block_run import check_ids
from triton_offload.kernels.fragments import Fragment, fragment_table
from triton_offload.kernels.table import ByteRange, PageTable, merged_ranges
from triton_offload.slabs import Slabs
from triton_offload.specs import CPULoadStoreSpec, Direction, GPULoadStoreSpec, Ids

KVCaches: TypeAlias = Iterable[torch.Tensor] | Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class GroupLayout:
    """One KV cache group: its pages in the slot, and in a staging buffer.

    `table` places the pages in a slot of the host pool; `packed` places them in a staging buffer,
    where only the group's own tensors take room; `byte_ranges` are what the two share. `size`:
    which of the pool's sizes (`triton_offload.slabs`) its slots have.
    `has_gaps`: pages are padded, so that a range has bytes that no page of the group owns.
    `columns`: int64 [5, tensors], of the table's pages their address in block 0, bytes between
    blocks, page bytes, offset in the slot, and bytes between pages in the slot. `range_columns`:
    int64 [3, byte ranges], their offset in the slot, in the buffer, and their bytes.
    """

    index: int
    table: PageTable
    packed: PageTable
    byte_ranges: tuple[ByteRange, ...]
    has_gaps: bool
    columns: Ids
    range_columns: Ids
    size: int = 0

    @classmethod
    def of(cls, index: int, table: PageTable, size: int = 0) -> GroupLayout:
        rows = [
            (page.view.data_ptr(), page.block_stride, page.page_bytes, page.offset, page.pitch)
            for page in table.pages
        ]
        columns = np.array(rows, dtype=np.int64).T.copy()
        gaps = any(row.pitch != row.page_bytes and not row.is_fragment for row in table.pages)
        ranges = [(r.slot_offset, r.packed_offset, r.num_bytes) for r in table.byte_ranges]
        range_columns = np.array(ranges, dtype=np.int64).T.copy()
        packed = table.packed()
        return cls(index, table, packed, table.byte_ranges, gaps, columns, range_columns, size)

    @property
    def fills_slot(self) -> bool:
        """Whether a whole chunk leaves no byte of its slot as it was."""
        return not self.has_gaps and self.packed.slot_bytes == self.table.slot_bytes


class CacheLayout:
    """The tensors of a KV cache and how its groups name them.

    `kv_caches`: `[num_blocks, ...]` tensors, a list or a dict by name, all on one device; they
    stay the caller's and must live as long as this does. Of a layer whose K and V are one tensor
    `[2, num_blocks, ...]`, give the two: `[half for tensor in tensors for half in tensor]`. A
    tensor's whole page has a place in the slot (see `PageTable`).
    `groups[g]`: `(tensor index, page bytes)` for every page of the group's blocks; page bytes may
    be less than the tensor's page where the engine pads it. None: one group of all tensors.
    Groups may name the same tensor, a group names each once.
    `packed`: a group's slots have its own pages alone, so that they differ in size; else every slot
    has a place for all tensors, as vLLM's have.

    Raises ValueError that names the argument.
    """

    def __init__(
        self,
        kv_caches: KVCaches,
        blocks_per_chunk: int = 1,
        groups: Sequence[Sequence[tuple[int, int]]] | None = None,
        *,
        packed: bool = False,
    ) -> None:
        self._fill(PageTable(kv_caches, blocks_per_chunk, name="kv_caches"), groups, packed)

    @classmethod
    def named(
        cls,
        kv_caches: KVCaches,
        blocks_per_chunk: int = 1,
        groups: Sequence[Sequence[int | str]] | None = None,
    ) -> CacheLayout:
        """The packed layout with whole pages: `groups[g]` are the tensors of the group, by index
        (list) or name (dict)."""
        table = PageTable(kv_caches, blocks_per_chunk, name="kv_caches")
        names = list(kv_caches) if isinstance(kv_caches, Mapping) else range(len(table.pages))
        refs: list[list[tuple[int, int]]] | None = None
        if groups is not None:
            index: dict[int | str, int] = {name: i for i, name in enumerate(names)}
            refs = [
                [
                    (i, table.pages[i].page_bytes)
                    for i in named_members(f"groups[{g}]", group, index)
                ]
                for g, group in enumerate(listed("groups", groups))
            ]
        layout = cls.__new__(cls)
        layout._fill(table, refs, packed=True)
        return layout

    @classmethod
    def in_fragments(
        cls,
        kv_caches: KVCaches,
        blocks_per_chunk: int,
        place_bytes: Sequence[int],
        groups: Sequence[Sequence[Fragment]],
    ) -> CacheLayout:
        """The layout of one of several that fill slots together, its pages cut into fragments.

        `place_bytes`: what a block has of a slot in all, for each tensor. `groups[g]`: the
        fragments of the group's pages (see `fragment_table`). Of a slot only those are touched.
        """
        table = PageTable(kv_caches, blocks_per_chunk, name="kv_caches")
        tables = [
            fragment_table(table, place_bytes, group, name=f"groups[{g}]")
            for g, group in enumerate(groups)
        ]
        members: list[dict[int, int]] = [{} for _ in groups]
        for pages, group in zip(members, groups, strict=True):
            for each in group:
                pages[each.tensor] = pages.get(each.tensor, 0) + each.num_bytes
        layout = cls.__new__(cls)
        layout._take(table, tables, members, packed=False)
        own = merged_ranges((row for each in tables for row in each.pages), blocks_per_chunk)
        layout.own_ranges = tuple((part.slot_offset, part.num_bytes) for part in own)
        layout.leaves_stale = ~np.eye(len(groups), dtype=np.bool_)
        return layout

    def _fill(
        self, table: PageTable, groups: Sequence[Sequence[tuple[int, int]]] | None, packed: bool
    ) -> None:
        if groups is None:
            tables = [table]
            members = [{i: page.page_bytes for i, page in enumerate(table.pages)}]
        else:
            refs = [
                listed(f"groups[{g}]", group) for g, group in enumerate(listed("groups", groups))
            ]
            if not refs:
                raise ValueError("groups: expected at least one group, got none")
            tables = [table.group(group, name=f"groups[{g}]") for g, group in enumerate(refs)]
            members = [{int(i): int(size) for i, size in group} for group in refs]
            for g, (group, pages) in enumerate(zip(refs, members, strict=True)):
                if len(pages) != len(group):
                    twice = [i for i, _ in group]
                    raise ValueError(f"groups[{g}]: expected each tensor once, got {twice}")
        self._take(table, tables, members, packed)

    def _take(
        self,
        table: PageTable,
        tables: list[PageTable],
        members: list[dict[int, int]],
        packed: bool,
    ) -> None:
        self.blocks_per_chunk = table.blocks_per_chunk
        self.device = table.device
        #: (offset, bytes) of what is this layout's of a slot; None: all of it
        self.own_ranges: tuple[tuple[int, int], ...] | None = None
        if packed:
            tables = [table.packed() for table in tables]
        #: bytes of the groups' slots, each size once
        self.slot_sizes = list(dict.fromkeys(table.slot_bytes for table in tables))
        self.groups = tuple(
            GroupLayout.of(i, table, self.slot_sizes.index(table.slot_bytes))
            for i, table in enumerate(tables)
        )
        #: the tensors of each group, in the order of its table's pages
        self.members = tuple(tuple(group) for group in members)
        # Groups whose blocks may be the same bytes: a load must not write one twice.
        self._overlaps = tuple(
            tuple(j for j in range(i) if _share_bytes(self.groups[i], self.groups[j]))
            for i in range(len(members))
        )
        #: [g, h]: a chunk of group g, stored whole over one of group h, leaves bytes of that: where
        #: a page of h is longer than g's of the same tensor, or g has none there.
        self.leaves_stale = np.array(
            [
                [any(new.get(i, 0) < size for i, size in old.items()) for old in members]
                for new in members
            ]
        )
        if packed:  # where groups share slots, their pages do not lie side by side
            gaps = np.array([not group.fills_slot for group in self.groups])
            self.leaves_stale = gaps[:, None] & ~np.eye(len(gaps), dtype=np.bool_)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot; where sizes differ, of the largest."""
        return max(self.slot_sizes)

    def plan(
        self,
        direction: Direction,
        device_spec: GPULoadStoreSpec,
        host_spec: CPULoadStoreSpec,
        num_slots: int,
    ) -> list[GroupRun]:
        """The job's runs, one per group that takes part, all ids checked.

        Costs O(blocks) and touches no tensor. Raises ValueError naming the argument.
        """
        sizes = device_spec.group_sizes
        if len(sizes) != len(self.groups):
            raise ValueError(
                f"group_sizes: expected one size for each of {len(self.groups)} groups, "
                f"got {len(sizes)}"
            )
        slot_ids, fresh = host_spec.slot_ids, host_spec.fresh
        check_ids("slot_ids", slot_ids, num_slots, distinct=direction is Direction.STORE)
        runs: list[GroupRun] = []
        block, chunk = 0, 0
        for group, size, index in zip(self.groups, sizes, device_spec.block_indices, strict=True):
            if size == 0:
                continue
            first = index % self.blocks_per_chunk
            chunks = -(-(first + size) // self.blocks_per_chunk)
            if chunk + chunks > len(slot_ids):
                break
            slots = slot_ids[chunk : chunk + chunks]
            runs.append(
                GroupRun(
                    group,
                    device_spec.block_ids[block : block + size],
                    slots,
                    slots,
                    first,
                    None if fresh is None else fresh[chunk : chunk + chunks],
                )
            )
            block += size
            chunk += chunks
        if block != len(device_spec.block_ids) or chunk != len(slot_ids):
            needed = sum(
                -(-(i % self.blocks_per_chunk + n) // self.blocks_per_chunk)
                for n, i in zip(sizes, device_spec.block_indices, strict=True)
                if n
            )
            raise ValueError(
                f"slot_ids: expected {needed} slots for these blocks at {self.blocks_per_chunk} "
                f"blocks per chunk, got {len(slot_ids)}"
            )
        loads = direction is Direction.LOAD
        for run in runs:
            check_ids("block_ids", run.block_ids, run.group.table.num_blocks, distinct=loads)
        if loads:
            self._check_shared_destinations(runs)
        return runs

    def _check_shared_destinations(self, runs: list[GroupRun]) -> None:
        """Blocks of different groups must be different bytes too."""
        of_group = {run.group.index: run.block_ids for run in runs}
        for index, block_ids in of_group.items():
            for other in self._overlaps[index]:
                both = np.intersect1d(block_ids, of_group.get(other, block_ids[:0]))
                if len(both):
                    raise ValueError(
                        f"block_ids: expected distinct destinations, got block {both[0]} in "
                        f"groups {other} and {index}, which share a tensor"
                    )


def place(runs: Sequence[GroupRun], slabs: Slabs) -> list[GroupRun]:
    """The runs of a job with the rows of their slots, where the pool has slots of several sizes.

    Raises ValueError for slots of another size than the group's, or that lie across others.
    """
    slabs.check_apart([(run.group.size, run.slot_ids) for run in runs])
    return [run._replace(rows=slabs.rows(run.group.size, run.slot_ids)) for run in runs]


class GroupRun(NamedTuple):
    """A job's consecutive blocks of one group, with the slots that hold their chunks.

    Block i of the run lies in `slot_ids[(first + i) // B]` at position `(first + i) % B`, with
    `first < B` the place of the run's first block in its first chunk. `rows`: where these slots lie
    among all of their size (`SlotSize.rows`); the ids themselves where there is one size.

    A tuple, for a job makes one for each segment, and a frozen dataclass takes 2.5 times as long.
    """

    group: GroupLayout
    block_ids: Ids
    slot_ids: Ids
    rows: Ids
    first: int
    fresh: npt.NDArray[np.bool_] | None

    @property
    def num_bytes(self) -> int:
        return len(self.block_ids) * self.group.table.bytes_per_block

    def split(self, max_chunks: int, first: int = 0, last: int = 0) -> Iterator[GroupRun]:
        """The run in parts of at most `max_chunks` chunks.

        `first`, `last`: of a first part, or a last one, that would have three times as many chunks
        or more, so many are a part of their own; 0: none are.
        """
        span = self.group.table.blocks_per_chunk
        ends = [0, *range(max_chunks, len(self.slot_ids), max_chunks), len(self.slot_ids)]
        if first and ends[1] >= 3 * first:
            ends.insert(1, first)
        if last and ends[-1] - ends[-2] >= 3 * last:
            ends.insert(-1, ends[-1] - last)
        if len(ends) == 2:  # the common job: few chunks
            yield self
            return
        for chunk, end in itertools.pairwise(ends):
            blocks = slice(max(0, chunk * span - self.first), end * span - self.first)
            slots = self.slot_ids[chunk:end]
            yield GroupRun(
                self.group,
                self.block_ids[blocks],
                slots,
                slots if self.rows is self.slot_ids else self.rows[chunk:end],
                self.first if chunk == 0 else 0,
                None if self.fresh is None else self.fresh[chunk:end],
            )

    def blocks_of_chunk(self, chunk: int) -> tuple[int, int]:
        """The positions [begin, end) of the chunk that the run holds."""
        span = self.group.table.blocks_per_chunk
        begin = self.first if chunk == 0 else 0
        return begin, min(span, self.first + len(self.block_ids) - chunk * span)

    def partial_chunks(self) -> list[int]:
        """The chunks that the run does not fill: at most the first and the last."""
        span = self.group.table.blocks_per_chunk
        if len(self.block_ids) == len(self.slot_ids) * span:
            return []
        ends = {0, len(self.slot_ids) - 1}
        return [chunk for chunk in sorted(ends) if self.blocks_of_chunk(chunk) != (0, span)]


def _share_bytes(one: GroupLayout, other: GroupLayout) -> bool:
    """Whether pages of a block of the one and of the other lie over one another."""
    begins, others = one.columns[0][:, None], other.columns[0]
    ends, others_end = begins + one.columns[2][:, None], others + other.columns[2]
    return bool(((begins < others_end) & (others < ends)).any())


def listed(name: str, values: Any) -> list[Any]:
    """The members of an argument that lists them; not of a string, nor the keys of a dict."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"{name}: expected a list, got {shown(values)}")
    return list(values)


def named_members(name: str, group: Any, index: Mapping[int | str, int]) -> list[int]:
    """The tensors that a group names, by their indices."""
    found = []
    for member in listed(name, group):
        named = isinstance(member, str | int | np.integer) and not isinstance(member, bool)
        if not named or member not in index:  # True would be found where 1 is
            raise ValueError(f"{name}: expected members of {list(index)}, got {shown(member)}")
        found.append(index[member])
    return found
