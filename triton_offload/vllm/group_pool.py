"""How large the slots of each group are, and how a pool is cut into them."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from triton_offload.slabs import Slabs


@dataclass(frozen=True, slots=True)
class GroupPool:
    """`slot_bytes`: of each group's slots, on one rank. `slabs`: how each of `ranks` parts of the
    pool is cut."""

    slot_bytes: tuple[int, ...]
    slabs: Slabs
    ranks: int

    @classmethod
    def fit(cls, pool_bytes: int, ranks: int, slot_bytes: Sequence[int]) -> GroupPool:
        """All parts together have at most `pool_bytes`. Raises ValueError that names
        `cpu_bytes_to_use` where a part has no room for the largest slot."""
        # A part of vLLM's region begins at a page of the system, so that it can be pinned.
        part = pool_bytes // ranks // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            slabs = Slabs.fit(part, list(dict.fromkeys(slot_bytes)))
        except ValueError as error:
            raise ValueError(str(error).replace("host_bytes", "cpu_bytes_to_use")) from error
        return cls(tuple(slot_bytes), slabs, ranks)

    @property
    def sizes(self) -> list[int]:
        """Bytes of slots, each once: those of the slabs."""
        return list(dict.fromkeys(self.slot_bytes))

    @property
    def part_bytes(self) -> int:
        """Of each rank's part, in whole pages of the system."""
        return -(-self.slabs.num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE

    def size_of_group(self, groups: Sequence[Any]) -> dict[int, int]:
        """Which size the slots of each group have. `groups`: vLLM's OffloadingGroupConfigs."""
        sizes = zip(groups, self.slot_bytes, strict=True)
        return {group.group_id: self.sizes.index(num_bytes) for group, num_bytes in sizes}

    def described(self, info: Any, config: Any) -> Any:
        """vLLM's CPUOffloadingInfo of this pool, from what it says of one with equal slots.

        `config`: its OffloadingConfig. Tokens are those of requests of the model's length.
        """
        length = config.model.max_model_len
        tokens = info.cpu_kv_cache_size_tokens
        if tokens is not None:
            request_bytes = 0
            for group, num_bytes in zip(config.groups, self.slot_bytes, strict=True):
                chunks = -(-length // (group.tokens_per_block * config.cache.blocks_per_chunk))
                window = group.sliding_window_size_in_chunks
                request_bytes += num_bytes * (chunks if window is None else min(chunks, window))
            tokens = self.slabs.num_bytes * length // request_bytes
        return dataclasses.replace(
            info,
            cpu_num_chunks=self.slabs.most_chunks,
            cpu_kv_cache_size_bytes=self.slabs.num_bytes * self.ranks,
            cpu_kv_cache_size_tokens=tokens,
        )
