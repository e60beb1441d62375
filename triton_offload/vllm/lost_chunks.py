"""Chunks in vLLM's manager that could not be loaded, and leave it for that."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.v1.kv_offload.base import OffloadingEvent


class LostChunks:
    """Takes chunks out of `manager`, vLLM's CPUOffloadingManager, as an eviction would.

    vLLM's manager forgets what could not be stored, and keeps what could not be loaded: that
    would be found, loaded in vain and recomputed by every request from then on. Of a
    TieringOffloadingManager they leave the pool, not the tiers: the next request has what a tier
    kept brought back.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = getattr(manager, "primary_tier", manager)
        self._chunks: dict[Any, Any] = {}  # by key, in the order they were lost

    def add(self, keys: Iterable[Any]) -> None:
        """These, which a load uses, are to leave once no transfer uses them."""
        self._chunks.update((key, self._manager._policy.get(key)) for key in keys)

    def drop_idle(self) -> int:
        """Let those go that no transfer uses, and return how many did. The others wait."""
        dropped = []
        for key, chunk in list(self._chunks.items()):
            # One that a tier was still reading may have left since, and another have its key.
            is_there = chunk is not None and self._manager._policy.get(key) is chunk
            if is_there and chunk.ref_cnt > 0:
                continue
            del self._chunks[key]
            if is_there:
                self._drop(key, chunk)
                dropped.append(key)
        if dropped and self._manager.events is not None:
            event = OffloadingEvent(keys=dropped, medium=self._manager.medium, removed=True)
            self._manager.events.append(event)
        return len(dropped)

    def clear(self) -> None:
        """Everything has left the manager."""
        self._chunks.clear()

    def _drop(self, key: Any, chunk: Any) -> None:
        self._manager._policy.mark_non_evictable(key)
        self._manager._num_evictable_cache_chunks -= 1
        self._manager._policy.remove(key)
        self._manager._free_chunk(chunk)
