"""What a call was given, in the terms of the manager and of transfers; all of it checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt
import torch

from triton_offload.kernels.arguments import as_integer
from triton_offload.kernels.block_run import check_ids
from triton_offload.scheduler.chunks import ChunkSpan
from triton_offload.scheduler.policies import Key
from triton_offload.specs import GPULoadStoreSpec, Ids, as_ids
from triton_offload.transfer.layout import CacheLayout

_BYTES = frozenset({bytes})
_GROUP_BYTES = 4

BlockIds = Sequence[int] | npt.NDArray[np.integer] | torch.Tensor


class RequestReader:
    """Reads keys, blocks and spans of requests for a cache of this layout.

    Everything that it returns is a copy. Raises ValueError or TypeError with the argument's name.
    """

    def __init__(self, layout: CacheLayout) -> None:
        self._layout = layout
        self._num_groups = len(layout.groups)

    def group(self, group: SupportsIndex) -> int:
        number = as_integer("group", group)
        if number >= self._num_groups:
            raise ValueError(f"group: expected 0 to {self._num_groups - 1}, got {group}")
        return number

    def keys(self, keys: Sequence[bytes], group: int) -> list[Key]:
        """As the manager knows them: where there are several groups, with the group's number
        behind, as vLLM does."""
        number = self.group(group)
        if type(keys) is not list and (  # for the other questions take longer
            isinstance(keys, (bytes, str)) or not isinstance(keys, Iterable)
        ):
            raise ValueError(f"keys: expected one key (bytes) per chunk, got {type(keys).__name__}")
        keys = list(keys)
        if not _BYTES.issuperset(map(type, keys)):  # no loop where all are just that
            for key in keys:
                if not isinstance(key, bytes):
                    raise ValueError(f"keys: expected bytes, got {type(key).__name__}")
        if self._num_groups == 1:
            return keys
        suffix = number.to_bytes(_GROUP_BYTES, "big")
        return [key + suffix for key in keys]

    def given(self, keys: Sequence[Key]) -> Sequence[bytes]:
        """The keys as the caller gave them, without the group's number."""
        return keys if self._num_groups == 1 else [key[:-_GROUP_BYTES] for key in keys]

    def block_ids(self, block_ids: BlockIds, group: int, *, distinct: bool) -> Ids:
        ids = as_ids("block_ids", block_ids)
        check_ids("block_ids", ids, self._layout.groups[group].table.num_blocks, distinct=distinct)
        return ids

    def span(
        self, num_keys: int, num_blocks: SupportsIndex, first_block: SupportsIndex
    ) -> ChunkSpan:
        """The chunks that these blocks of a request fill, which must be as many as the keys."""
        span = ChunkSpan.of(first_block, num_blocks, self._layout.blocks_per_chunk)
        if num_keys != span.num_chunks:
            raise ValueError(
                f"keys: expected {span.num_chunks} for {num_blocks} blocks from {first_block} on "
                f"at {self._layout.blocks_per_chunk} blocks per chunk, got {num_keys}"
            )
        return span

    def device_spec(self, ids: Ids, first: int, group: int) -> GPULoadStoreSpec:
        """Blocks of one group, the first at `first` of its chunk."""
        sizes = [len(ids) if i == group else 0 for i in range(self._num_groups)]
        return GPULoadStoreSpec(ids, sizes, [first] * self._num_groups)
